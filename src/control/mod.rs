//! The control socket: requests and replies between `fastaa-ctl` (and scripts) and the daemon.
//!
//! Owns the messages, the server, the blocking client, and the rule where the sockets are. Knows
//! of policies; streams and datasets it only carries reports of. Never touches batches.
//!
//! One JSON object per line each way: a [`Request`], then `{"ok": REPLY}` or
//! `{"error": {"code", "message", "hint"}}`. A connection carries any number of requests, one
//! after the other.

mod client;
mod messages;
mod paths;
mod policies;
mod search_messages;
mod server;

pub use client::{ControlClient, ControlClientError};
pub use messages::{
    ControlFailure, DaemonReport, DatasetReport, ExpectedDigestReport, FailureCode, LineageReport,
    PolicyHeadReport, PolicyPublishedReport, PolicyReport, PolicyVersionReport, Reply, ReplyLine,
    Request, StatusReport, StreamReport, VersionSummary,
};
pub use paths::{PathsError, RuntimePaths};
pub use policies::{handle_policy, policy_reports, version_report};
pub use search_messages::{
    GpuReport, IdleReport, MetricReport, SearchProgressReport, SearchReport, SearchRoundReport,
};
pub use server::{ControlServer, Handler, ServerOptions};
