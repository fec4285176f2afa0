//! The command-line client's entry point.

use std::process::ExitCode;

fn main() -> ExitCode {
    fastaa::ctl::main()
}
