//! The command-line client.
//!
//! It compiles the modules that it needs instead of linking the library: whatever the library
//! holds, this program cannot come to depend on libtorch, in any build profile. (Linking the
//! library does not do: one object file of it that mentions tch pulls all of libtorch in.)

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the modules are the library's, and it uses the rest"
)]

use std::process::ExitCode;

#[path = "../augment/mod.rs"]
mod augment;
#[path = "../control/mod.rs"]
mod control;
#[path = "../ctl/mod.rs"]
mod ctl;
#[path = "../dataset/mod.rs"]
mod dataset;
#[path = "../image/mod.rs"]
mod image;
#[path = "../limits.rs"]
mod limits;
#[path = "../policy/mod.rs"]
mod policy;
#[path = "../random.rs"]
mod random;
#[path = "../search/progress.rs"]
mod search_progress;

/// Of the search, the shapes of its worker's events alone.
mod search {
    pub(crate) use super::search_progress as progress;
}

fn main() -> ExitCode {
    ctl::main()
}
