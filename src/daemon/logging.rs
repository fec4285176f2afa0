//! Structured logs on stderr: text for people and the journal, or JSON.

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, TelemetryConfig};

/// Starts logging; `Err` says what is wrong with the filter.
pub(super) fn start(config: &TelemetryConfig) -> Result<(), String> {
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
