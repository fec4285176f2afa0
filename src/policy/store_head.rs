//! Which version of a dataset's policy is active, and the changes to that.
//!
//! Owns the state behind `active.json`. Never touches files (`store_files` does).

use serde::{Deserialize, Serialize};

use crate::limits;

/// Which version of a dataset's policy is active, and how that came.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// The version that `active` means: the pinned one, else [`Head::unpinned`].
    pub active: u64,
    /// The version that is held whatever is published.
    pub pinned: Option<u64>,
    /// The version that is active without a pin.
    pub unpinned: u64,
    /// Newest version whose publication is accounted for here.
    pub latest: u64,
    /// Versions that were active before, which rollback returns to, newest last.
    pub previous: Vec<u64>,
    /// Every change of the active version, newest last.
    pub history: Vec<HistoryEntry>,
}

/// One change of the active version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// RFC 3339, UTC.
    pub at: String,
    /// What was done.
    pub kind: HistoryKind,
    /// The version active from then on.
    pub version: u64,
}

/// What changed the active version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HistoryKind {
    /// A new version.
    Publish,
    /// A version was pinned.
    Pin,
    /// The pin was taken away.
    Unpin,
    /// Back to the version before.
    Rollback,
}

impl Head {
    /// A new version: active unless another is pinned.
    pub(super) fn publish(&mut self, version: u64, at: String) {
        self.latest = version;
        self.unpinned = version;
        if self.pinned.is_none() {
            self.activate(version, HistoryKind::Publish, at);
        }
    }

    /// Makes a version active; rollback will return to the one before.
    pub(super) fn activate(&mut self, version: u64, kind: HistoryKind, at: String) {
        if version != self.active {
            self.previous.push(self.active);
            forget_oldest(&mut self.previous);
        }
        self.active = version;
        self.record(kind, at);
    }

    /// Adds to the history.
    pub(super) fn record(&mut self, kind: HistoryKind, at: String) {
        self.history.push(HistoryEntry { at, kind, version: self.active });
        forget_oldest(&mut self.history);
    }
}

fn forget_oldest<T>(list: &mut Vec<T>) {
    let excess = list.len().saturating_sub(limits::POLICY_HISTORY_MAX);
    list.drain(..excess);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_activations_are_forgotten() {
        let mut head = Head::default();
        let n_versions = limits::POLICY_HISTORY_MAX as u64 + 5;
        for version in 1..=n_versions {
            head.publish(version, version.to_string());
        }
        assert_eq!(head.active, n_versions);
        assert_eq!(head.history.len(), limits::POLICY_HISTORY_MAX);
        assert_eq!(head.history[0].version, 6);
        assert_eq!(head.previous.len(), limits::POLICY_HISTORY_MAX);
        assert_eq!((head.previous[0], head.previous.last()), (5, Some(&(n_versions - 1))));
    }
}
