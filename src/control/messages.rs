//! What is said on the control socket.
//!
//! Owns the JSON shapes. Variants and fields are append-only: a new field has a default, so that
//! an older or newer peer still understands the rest. `status --json` prints [`StatusReport`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::search_messages::{MetricReport, SearchReport};

/// A request: `{"request": "policy-show", "reference": "active"}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Everything on one page; answered by [`Reply::Status`].
    Status,
    /// One policy; answered by [`Reply::PolicyVersion`].
    PolicyShow {
        /// `active`, `NAME@VERSION`, `NAME@active` or a built-in; never a path: the daemon reads
        /// no files for others.
        reference: String,
        /// The dataset that `active` means; `None`: the only one.
        #[serde(default)]
        dataset: Option<String>,
    },
    /// All versions; answered by [`Reply::PolicyList`].
    PolicyList {
        /// `None`: of every dataset.
        #[serde(default)]
        dataset: Option<String>,
    },
    /// A new version; answered by [`Reply::PolicyPublished`].
    PolicyPublish {
        /// For which dataset; `None`: the only one.
        #[serde(default)]
        dataset: Option<String>,
        /// The policy, in either form of policy files.
        policy: Value,
        /// Why; free form.
        #[serde(default)]
        evidence: Value,
    },
    /// Holds a version active; answered by [`Reply::PolicyHead`].
    PolicyPin {
        /// For which dataset; `None`: the one in the reference, else the only one.
        #[serde(default)]
        dataset: Option<String>,
        /// `NAME@VERSION`, `VERSION`, `active`, or `none` for version 0.
        reference: String,
    },
    /// Lets go of the pin; answered by [`Reply::PolicyHead`].
    PolicyUnpin {
        /// For which dataset; `None`: the only one.
        #[serde(default)]
        dataset: Option<String>,
    },
    /// Back to the version before; answered by [`Reply::PolicyHead`].
    PolicyRollback {
        /// For which dataset; `None`: the only one.
        #[serde(default)]
        dataset: Option<String>,
    },
    /// The running streams; answered by [`Reply::Streams`].
    StreamList,
    /// The datasets; answered by [`Reply::Datasets`].
    DatasetList,
    /// The digest of an epoch's sample indices; answered by [`Reply::ExpectedDigest`].
    ExpectedDigest {
        /// Name in the configuration.
        dataset: String,
        /// `train`, `test`, …
        split: String,
        /// Of the stream.
        seed: u64,
        /// Which epoch.
        epoch: u64,
        /// Samples per rank and step.
        batch_size: u32,
        /// Ranks that share each global batch.
        world_size: u32,
        /// Which of them.
        rank: u32,
        /// Drop the last, incomplete global batch.
        drop_last: bool,
        /// Keyed permutation, or index order.
        shuffle: bool,
        /// Global samples of the epoch that were already yielded.
        #[serde(default)]
        start_offset: u64,
    },
    /// Where the search is; answered by [`Reply::Search`].
    SearchStatus,
    /// Stops the search where it is; answered by [`Reply::Search`].
    SearchPause,
    /// Lets a paused search go on; answered by [`Reply::Search`].
    SearchResume,
    /// Starts the search if it does not run, and resumes a paused one; answered by
    /// [`Reply::Search`].
    SearchRun,
    /// The search's report as a page; answered by [`Reply::SearchHtml`].
    SearchReport,
    /// A run's metric after an epoch; answered by [`Reply::Metric`].
    ReportMetric {
        /// Name in the configuration.
        dataset: String,
        /// The run: its group, or a name that no other run has.
        run: String,
        /// The epoch that was just finished.
        epoch: u64,
        /// Reference of the policy that the epoch was trained with.
        policy: String,
        /// On clean data; higher is better.
        value: f64,
    },
}

/// The answer's line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(clippy::large_enum_variant, reason = "there is one at a time, and not for long")]
pub enum ReplyLine {
    /// Done.
    Ok(Reply),
    /// Not done, and why.
    Error(ControlFailure),
}

/// A good answer: `{"reply": "status", …}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
#[allow(clippy::large_enum_variant, reason = "there is one at a time, and not for long")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(StatusReport),
    /// To [`Request::PolicyShow`].
    PolicyVersion(PolicyVersionReport),
    /// To [`Request::PolicyList`].
    PolicyList {
        /// One per dataset.
        lineages: Vec<LineageReport>,
    },
    /// To [`Request::PolicyPublish`].
    PolicyPublished(PolicyPublishedReport),
    /// To pin, unpin and rollback.
    PolicyHead(PolicyHeadReport),
    /// To [`Request::StreamList`].
    Streams {
        /// One per connected consumer.
        streams: Vec<StreamReport>,
    },
    /// To [`Request::DatasetList`].
    Datasets {
        /// One per split.
        datasets: Vec<DatasetReport>,
    },
    /// To [`Request::ExpectedDigest`].
    ExpectedDigest(ExpectedDigestReport),
    /// To the requests about the search.
    Search(SearchReport),
    /// To [`Request::SearchReport`].
    SearchHtml {
        /// The page.
        html: String,
    },
    /// To [`Request::ReportMetric`].
    Metric(MetricReport),
}

/// Kinds of failure. Append-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureCode {
    /// No such thing.
    NotFound,
    /// The request is wrong.
    Invalid,
    /// The daemon's state forbids it.
    Conflict,
    /// A fault of the daemon, or of its files.
    Internal,
    /// The user may not.
    Forbidden,
    /// Too many connections.
    Exhausted,
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlFailure {
    /// Kind.
    pub code: FailureCode,
    /// What is wrong.
    pub message: String,
    /// What to do about it, or empty.
    #[serde(default)]
    pub hint: String,
}

impl ControlFailure {
    /// A failure without a hint.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: String::new() }
    }

    /// The same with a hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

/// The daemon on one page.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The process.
    pub daemon: DaemonReport,
    /// One per split.
    pub datasets: Vec<DatasetReport>,
    /// One per connected consumer.
    pub streams: Vec<StreamReport>,
    /// One per dataset.
    pub policies: Vec<PolicyReport>,
    /// Counters by name, since the start.
    pub counters: BTreeMap<String, u64>,
    /// The policy search.
    #[serde(default)]
    pub search: SearchReport,
}

/// The daemon's process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DaemonReport {
    /// Of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Since its start.
    pub uptime_seconds: f64,
    /// Where its sockets are.
    pub runtime_dir: String,
    /// Where its state is.
    pub state_dir: String,
    /// Version of libtorch, or `None` if built without.
    pub torch: Option<String>,
    /// Worker threads.
    pub threads: u32,
    /// Address of the HTTP server (`127.0.0.1:9464`), or `None`.
    #[serde(default)]
    pub http: Option<String>,
    /// Where TCP clients connect (`tcp://127.0.0.1:5555`), or `None`.
    #[serde(default)]
    pub tcp: Option<String>,
}

/// One split of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DatasetReport {
    /// Name in the configuration.
    pub name: String,
    /// `train`, `test`, …
    pub split: String,
    /// `arrow`, `idx`, …
    pub format: String,
    /// Samples in the split.
    pub n_samples: u64,
    /// `[height, width, channels]` of every sample; `null` for encoded images of any size.
    pub shape: Option<[u64; 3]>,
    /// `class` or `vector`.
    pub label_kind: String,
    /// Classes; for vector labels, their length.
    pub n_classes: u32,
    /// Names of the classes, or empty.
    pub class_names: Vec<String>,
    /// Identity of the content.
    pub fingerprint: String,
    /// File or folder.
    pub path: String,
    /// Bytes mapped.
    pub mapped_bytes: u64,
}

/// One connected consumer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Number of the connection.
    pub session: u64,
    /// Name in the configuration.
    pub dataset: String,
    /// `train`, `test`, …
    pub split: String,
    /// What the client calls itself.
    pub client: String,
    /// Its process; `None` over TCP.
    pub pid: Option<u32>,
    /// Its user; `None` over TCP.
    pub uid: Option<u32>,
    /// `local` or `tcp`.
    pub transport: String,
    /// Its place among the ranks.
    pub rank: u32,
    /// Ranks that share each global batch.
    pub world_size: u32,
    /// Name of the run, or empty.
    pub group: String,
    /// Samples per rank and step.
    pub batch_size: u32,
    /// Epoch under way.
    pub epoch: u64,
    /// Batches of the epoch that were sent since the session began it, queued ones included.
    pub step: u64,
    /// Samples of the epoch, all ranks together, after the last batch that was sent.
    pub next_offset: u64,
    /// Since the connection.
    pub batches_sent: u64,
    /// Since the connection.
    pub samples_sent: u64,
    /// Slots that the consumer reads or has queued.
    pub leased_slots: u32,
    /// Slots that can be filled.
    pub free_slots: u32,
    /// Slots in its slab.
    pub n_slots: u32,
    /// Reference of the epoch's policy.
    pub policy: String,
    /// Its version; 0 for a built-in or a file.
    pub policy_version: u64,
    /// Recent rate.
    pub images_per_second: f64,
    /// Of a broadcast group's member: `shared` (it reads the group's window, if anybody else does)
    /// or `beyond` (the group is past it, and its batches are made for it alone); else empty.
    pub window: String,
    /// It gets the same batches again and again, to measure what a training could reach.
    pub is_replay: bool,
    /// Batches since the connection that were read from the group's window.
    pub batches_shared: u64,
}

/// The active policy of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyReport {
    /// Name in the configuration.
    pub dataset: String,
    /// 0: the built-in `none`.
    pub active_version: u64,
    /// The pinned version, if any.
    pub pinned: Option<u64>,
    /// The policy's own name.
    pub name: String,
    /// Its identity, in hexadecimal digits.
    pub id: String,
    /// Its size.
    pub n_sub_policies: u64,
    /// RFC 3339, UTC; `None` for version 0.
    pub published_at: Option<String>,
    /// Why the active policy cannot be read, if so.
    #[serde(default)]
    pub problem: Option<String>,
}

/// One policy with all that is known of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyVersionReport {
    /// Names exactly this policy.
    pub reference: String,
    /// Whose version it is; `None` for a built-in or a file.
    pub dataset: Option<String>,
    /// 0 for a built-in or a file.
    pub version: u64,
    /// Identity, in hexadecimal digits.
    pub id: String,
    /// The policy, in the JSON form of policy files.
    pub policy: Value,
    /// Why it was published; null if unknown.
    pub evidence: Value,
    /// RFC 3339, UTC; `None` for a built-in or a file.
    pub published_at: Option<String>,
    /// The version that was to be active before; `None` for a built-in or a file.
    pub parent: Option<u64>,
    /// Whether it is the dataset's active version.
    pub is_active: bool,
    /// Whether it is pinned.
    pub is_pinned: bool,
}

/// All versions of a dataset's policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LineageReport {
    /// Name in the configuration.
    pub dataset: String,
    /// 0: the built-in `none`. `None`: it cannot be read, see `problem`.
    pub active_version: Option<u64>,
    /// The pinned version, if any.
    pub pinned: Option<u64>,
    /// Why the active version is not known, if so.
    pub problem: Option<String>,
    /// Ascending, from version 0.
    pub versions: Vec<VersionSummary>,
}

/// One line of [`LineageReport`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VersionSummary {
    /// From 0.
    pub version: u64,
    /// The policy's own name; empty if it cannot be read.
    pub name: String,
    /// Identity, in hexadecimal digits; empty if it cannot be read.
    pub id: String,
    /// Size.
    pub n_sub_policies: u64,
    /// RFC 3339, UTC; `None` for version 0.
    pub published_at: Option<String>,
    /// The version that was to be active before.
    pub parent: Option<u64>,
    /// Why it cannot be read, if so.
    pub problem: Option<String>,
}

/// Outcome of a publication.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyPublishedReport {
    /// Name in the configuration.
    pub dataset: String,
    /// The new version, or the one that already has this content.
    pub version: u64,
    /// Identity, in hexadecimal digits.
    pub id: String,
    /// Whether a version was made.
    pub is_new: bool,
    /// Whether it is active (a pin holds another).
    pub is_active: bool,
}

/// Which version is active now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyHeadReport {
    /// Name in the configuration.
    pub dataset: String,
    /// 0: the built-in `none`.
    pub active_version: u64,
    /// The pinned version, if any.
    pub pinned: Option<u64>,
}

/// What an undisturbed epoch delivers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpectedDigestReport {
    /// Digest of the sample indices, in hexadecimal digits.
    pub digest: String,
    /// Samples of the rank.
    pub n_samples: u64,
    /// Steps of the rank.
    pub n_steps: u64,
}
