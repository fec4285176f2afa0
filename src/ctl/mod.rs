//! The command-line client: one file per subcommand.
//!
//! Owns arguments, output and exit codes. Holds no logic of its own: what it shows comes from the
//! daemon's control socket, or from the library for the commands that need no daemon.
//!
//! Data goes to stdout, messages to stderr; `--json` output is stable; a broken pipe is success.

mod augment;
mod bars;
mod daemon;
mod dataset;
mod headspace;
mod output;
mod policy;
mod policy_text;
mod recode;
mod search;
mod search_offline;
mod status;
mod stream;
mod table;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Talk to a running fastaa-loaderd, and prepare its data.
#[derive(Debug, Parser)]
#[command(name = "fastaa-ctl", version, max_term_width = 100)]
struct Args {
    /// Runtime directory of the daemon [default: $FASTAA_RUNTIME_DIR, else the daemon's default]
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Machine-readable output
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One page: daemon, datasets, search, streams, policies
    Status,
    Top(top::TopArgs),
    /// Show, publish and choose augmentation policies
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Apply one operation or a policy to an image file (needs no daemon)
    Augment(augment::AugmentArgs),
    /// List, pack, inspect and verify datasets
    #[command(subcommand)]
    Dataset(dataset::DatasetCommand),
    /// Show and steer the policy search, or run it without a daemon
    #[command(subcommand)]
    Search(search::SearchCommand),
    /// Show the running streams
    #[command(subcommand)]
    Stream(stream::StreamCommand),
    /// Print a shell completion script
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// What every subcommand gets.
#[derive(Debug)]
pub(crate) struct Context {
    /// `--runtime-dir`.
    pub(crate) runtime_dir: Option<PathBuf>,
    /// `--json`.
    pub(crate) json: bool,
}

/// Why a command ends with an exit code other than 0.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// Refused or failed: exit code 1.
    #[error("{message}")]
    Failed {
        /// What went wrong.
        message: String,
        /// What to do about it, or empty.
        hint: String,
    },
    /// The arguments make no sense together: exit code 2.
    #[error("{message}")]
    Usage {
        /// What is wrong with them.
        message: String,
        /// What to do about it, or empty.
        hint: String,
    },
    /// The configuration, or what it names, cannot work: exit code 78.
    #[error("{0}")]
    Config(String),
    /// No daemon answers: exit code 69.
    #[error("{message}")]
    NoDaemon {
        /// Where one was looked for.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// Output failed; a broken pipe counts as success.
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
}

impl CtlError {
    /// A failure without a hint.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::Failed { message: message.into(), hint: String::new() }
    }
}

/// Parses the arguments, runs the command, and reports its error on stderr.
///
/// Exit codes: 0 ok, 1 refused or failed, 2 usage, 69 no daemon, 78 bad configuration.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let context = Context { runtime_dir: args.runtime_dir, json: args.json };
    let result = match args.command {
        Command::Status => status::run(&context),
        Command::Top(args) => top::run(&context, &args),
        Command::Policy(command) => policy::run(&context, command),
        Command::Augment(args) => augment::run(&context, args),
        Command::Dataset(command) => dataset::run(&context, command),
        Command::Search(command) => search::run(&context, command),
        Command::Stream(command) => stream::run(&context, &command),
        Command::Completions { shell } => {
            // Into memory first: the generator panics when its output is closed.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "fastaa-ctl", &mut script);
            output::print(&String::from_utf8_lossy(&script))
        }
    };
    output::exit_code(result)
}
