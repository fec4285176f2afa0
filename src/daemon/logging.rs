//! Structured logs on stderr: text for people and the journal, or JSON.

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, TelemetryConfig};

/// Starts logging; `Err` says what is wrong with the filter.
pub(super) fn start(config: &TelemetryConfig) -> Result<(), String> {
    // The filter's grammar takes a single unknown word for a module, and logs nothing else.
    let is_level = |word: &str| word.parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
    let text = &config.log;
    if !text.contains('=') && !text.split(',').any(|word| is_level(word.trim())) {
        return Err(format!("telemetry.log: '{text}' names no level; write for example \"info\""));
    }
    let filter = EnvFilter::builder().parse(&config.log).map_err(|error| {
        format!(
            "telemetry.log: '{}' is no log filter: {error}; write for example \"info\"",
            config.log
        )
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Json => builder.json().init(),
        LogFormat::Text => builder.with_target(false).with_ansi(false).init(),
    }
    Ok(())
}
