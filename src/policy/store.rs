//! The versioned policy store: one line of immutable versions per dataset, and which is active.
//!
//! Owns versions, activation, pin and rollback. Never judges a policy (the searcher's gate does).
//! Reads go to the disk each time: a version is small, and nothing can be stale.
//!
//! ```text
//! DIR/DATASET/000001.json   version 1: policy, id, evidence, time, parent; never rewritten
//! DIR/DATASET/active.json   active version, pin, history of activations
//! DIR/.by-id/ID.json        a policy that came as a file, kept by its content
//! DIR/.lock                 held by whoever writes
//! ```
//!
//! *Invariants*
//!
//! * Version 0 of every name is the built-in `none`; it has no file.
//! * Publishing is done once the version's file is renamed into place. If the writer dies before
//!   `active.json` follows, every reader completes the activation by itself: versions above
//!   `latest` in `active.json` are activated in order, as [`PolicyStore::publish`] would have.
//!   A lost `active.json` is rebuilt in the same way.
//! * Any number of processes write (the daemon, search workers), one at a time: every change holds
//!   the lock file `DIR/.lock` from the first look to the last write. Readers take no lock.
//!
//! *Limits*: [`limits::POLICY_VERSION_BYTES_MAX`], [`limits::POLICY_HISTORY_MAX`].

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

use super::error::suggestion;
use super::store_head::{Head, HistoryKind};
use super::store_lock::WriteLock;
use super::{Policy, PolicyError, PolicyId, builtin, rfc3339_utc, store_files};
use crate::limits;

/// One version of a dataset's policy.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyVersion {
    /// The dataset.
    pub name: String,
    /// 0 for the built-in `none`, else from 1.
    pub version: u64,
    /// The policy.
    pub policy: Policy,
    /// Its identity.
    pub id: PolicyId,
    /// Why it was published; free form.
    pub evidence: Value,
    /// RFC 3339, UTC; `None` for version 0.
    pub published_at: Option<String>,
    /// The version that would have been active instead; `None` for version 0.
    pub parent: Option<u64>,
}

/// A version's number, and its content or why that cannot be read.
pub type ListedVersion = (u64, Result<PolicyVersion, PolicyError>);

/// Outcome of [`PolicyStore::publish`].
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// The new version, or the active one if it has the same content.
    pub version: PolicyVersion,
    /// Whether a version was made.
    pub is_new: bool,
    /// Whether it is active (a pin holds another).
    pub is_active: bool,
}

/// What a reference means now.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedPolicy {
    /// The policy.
    pub policy: Policy,
    /// Its identity.
    pub id: PolicyId,
    /// Version in the store; 0 for a built-in or a file.
    pub version: u64,
    /// Names exactly this policy: `NAME@VERSION`, a built-in's name, or the path as given.
    pub reference: String,
}

/// A reference into the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredReference<'a> {
    /// `active`: of the dataset at hand.
    Active,
    /// `NAME@VERSION` or `NAME@active`.
    Named {
        /// The dataset.
        name: &'a str,
        /// `None` for `NAME@active`.
        version: Option<u64>,
    },
}

impl<'a> StoredReference<'a> {
    /// Reads a reference; `None` if it means a built-in or a file.
    ///
    /// # Errors
    /// It has an `@`, but the name or the version is malformed.
    pub fn parse(reference: &'a str) -> Result<Option<Self>, PolicyError> {
        let reference = reference.trim();
        if reference == "active" {
            return Ok(Some(Self::Active));
        }
        let is_file = builtin::looks_like_path(reference);
        let Some((name, version)) = reference.rsplit_once('@').filter(|_| !is_file) else {
            return Ok(None);
        };
        check_name(name)?;
        let version = match version {
            "active" => None,
            digits => Some(digits.parse().map_err(|_| {
                PolicyError::malformed(format!(
                    "policy '{reference}': '{digits}' is no version; write {name}@active or \
                     {name}@NUMBER"
                ))
            })?),
        };
        Ok(Some(Self::Named { name, version }))
    }
}

/// Begins a reference to a policy by its content.
const BY_ID_PREFIX: &str = "id:";
/// Folder of policies that came as files; the dot keeps it from being a dataset's name.
const BY_ID_DIR: &str = ".by-id";

/// See the module.
#[derive(Debug)]
pub struct PolicyStore {
    dir: PathBuf,
}

impl PolicyStore {
    /// Opens the store in `dir`, which is made if it is not there, and removes what a writer that
    /// died left half-written. Other processes may have it open and write to it.
    ///
    /// # Errors
    /// The folder cannot be made, read, locked or cleaned.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, PolicyError> {
        let store = Self { dir: dir.into() };
        store_files::create_dir(&store.dir)?;
        // What a living writer is just writing is no leftover.
        let _writer = store.lock()?;
        for name in store.names()? {
            store_files::remove_leftovers(&store.lineage_dir(&name))?;
        }
        Ok(store)
    }

    /// Names that have a folder in the store, sorted.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn names(&self) -> Result<Vec<String>, PolicyError> {
        let io_error = |error| PolicyError::io(&self.dir, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            let name = entry.file_name().into_string().unwrap_or_default();
            if entry.path().is_dir() && check_name(&name).is_ok() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Stores a new version, which becomes active unless another is pinned.
    ///
    /// If the version that is active without a pin has the same content, nothing is stored and
    /// that version is returned: whoever is killed after publishing can publish again.
    ///
    /// # Errors
    /// A bad name, a damaged store, too much evidence, or a file that cannot be written.
    pub fn publish(
        &self,
        name: &str,
        policy: &Policy,
        evidence: Value,
    ) -> Result<Published, PolicyError> {
        check_name(name)?;
        let _writer = self.lock()?;
        let dir = self.lineage_dir(name);
        let mut head = self.head(name)?;
        let id = policy.id();
        if let Ok(version) = self.get(name, head.unpinned)
            && version.id == id
        {
            let is_active = head.active == version.version;
            return Ok(Published { version, is_new: false, is_active });
        }
        store_files::create_dir(&dir)?;
        let newest = store_files::version_numbers(&dir)?.pop().unwrap_or(0).max(head.latest);
        let now = rfc3339_utc(SystemTime::now());
        let version = PolicyVersion {
            name: name.to_owned(),
            version: newest + 1,
            policy: policy.clone(),
            id,
            evidence,
            published_at: Some(now.clone()),
            parent: Some(head.unpinned),
        };
        store_files::write_version(&dir, &version)?;
        head.publish(version.version, now);
        if let Err(error) = store_files::write_head(&dir, name, &head) {
            // The version is on the disk, so it is published: readers complete the activation.
            tracing::warn!(dataset = name, version = version.version, %error,
                "a published policy's activation could not be written yet");
        }
        let is_active = head.active == version.version;
        Ok(Published { version, is_new: true, is_active })
    }

    /// Holds a version active, whatever is published. Version 0 can be pinned, too.
    ///
    /// # Errors
    /// No such version, or it is damaged.
    pub fn pin(&self, name: &str, version: u64) -> Result<Head, PolicyError> {
        self.change(name, |head, now| {
            self.get(name, version)?;
            head.pinned = Some(version);
            head.activate(version, HistoryKind::Pin, now);
            Ok(())
        })
    }

    /// Takes the pin away: what would be active without it becomes active.
    ///
    /// # Errors
    /// Nothing is pinned.
    pub fn unpin(&self, name: &str) -> Result<Head, PolicyError> {
        self.change(name, |head, now| {
            if head.pinned.take().is_none() {
                let message =
                    format!("'{name}' has no pinned policy, so there is nothing to unpin");
                return Err(PolicyError::conflict(message));
            }
            head.activate(head.unpinned, HistoryKind::Unpin, now);
            Ok(())
        })
    }

    /// Activates the version that was active before. Again: the one before that. What is
    /// published afterwards becomes active as ever; pin a version to hold it.
    ///
    /// # Errors
    /// A version is pinned, there was none before, or that one is damaged.
    pub fn rollback(&self, name: &str) -> Result<Head, PolicyError> {
        self.change(name, |head, now| self.roll_back(name, head, now))
    }

    /// As [`Self::rollback`], if `version` is the active one; else nothing is done: `None`.
    ///
    /// # Errors
    /// As [`Self::rollback`].
    pub fn rollback_from(&self, name: &str, version: u64) -> Result<Option<Head>, PolicyError> {
        let mut is_done = false;
        let head = self.change(name, |head, now| {
            is_done = head.active == version;
            if is_done { self.roll_back(name, head, now) } else { Ok(()) }
        })?;
        Ok(is_done.then_some(head))
    }

    fn roll_back(&self, name: &str, head: &mut Head, now: String) -> Result<(), PolicyError> {
        if let Some(pinned) = head.pinned {
            return Err(PolicyError::conflict(format!(
                "'{name}' is pinned at version {pinned}; unpin it first, or pin another version"
            )));
        }
        let Some(version) = head.previous.pop() else {
            return Err(PolicyError::conflict(format!(
                "'{name}' has no earlier active version to roll back to"
            )));
        };
        self.get(name, version)?;
        head.active = version;
        head.unpinned = version;
        head.record(HistoryKind::Rollback, now);
        Ok(())
    }

    /// Every version that has a file, ascending, and version 0 before them. A damaged one does
    /// not hide the others.
    ///
    /// # Errors
    /// A bad name, or a folder that cannot be read.
    pub fn list(&self, name: &str) -> Result<Vec<ListedVersion>, PolicyError> {
        check_name(name)?;
        let versions = store_files::version_numbers(&self.lineage_dir(name))?;
        let all = std::iter::once(0).chain(versions);
        Ok(all.map(|version| (version, self.get(name, version))).collect())
    }

    /// One version.
    ///
    /// # Errors
    /// No such version, or it is damaged.
    pub fn get(&self, name: &str, version: u64) -> Result<PolicyVersion, PolicyError> {
        check_name(name)?;
        if version == 0 {
            let policy = builtin::none();
            let id = policy.id();
            return Ok(PolicyVersion {
                name: name.to_owned(),
                version: 0,
                policy,
                id,
                evidence: Value::Null,
                published_at: None,
                parent: None,
            });
        }
        let dir = self.lineage_dir(name);
        match store_files::read_version(&dir, name, version) {
            Err(PolicyError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                let newest = store_files::version_numbers(&dir)?.pop().unwrap_or(0);
                Err(PolicyError::not_found(format!(
                    "there is no policy {name}@{version}; the newest version of '{name}' is \
                     {newest}"
                )))
            }
            result => result,
        }
    }

    /// The active version.
    ///
    /// # Errors
    /// A bad name, or a damaged `active.json` or version.
    pub fn active(&self, name: &str) -> Result<PolicyVersion, PolicyError> {
        self.get(name, self.head(name)?.active)
    }

    /// Which version is active and how that came, with publications completed that a dead writer
    /// did not note.
    ///
    /// # Errors
    /// A bad name, or a damaged `active.json`.
    pub fn head(&self, name: &str) -> Result<Head, PolicyError> {
        check_name(name)?;
        let dir = self.lineage_dir(name);
        let mut head = store_files::read_head(&dir, name)?.unwrap_or_default();
        let mut versions = store_files::version_numbers(&dir)?;
        versions.retain(|version| *version > head.latest);
        for version in versions {
            match store_files::read_version(&dir, name, version) {
                Ok(found) => head.publish(version, found.published_at.unwrap_or_default()),
                Err(error) => {
                    tracing::warn!(dataset = name, version, %error, "policy version skipped");
                }
            }
        }
        Ok(head)
    }

    /// What a reference means now: `active` (of `dataset_name`), `NAME@VERSION`, `NAME@active`,
    /// a built-in, a file, or `id:` and the content hash of a file that was resolved before.
    ///
    /// The result's reference means the same policy for ever: a file is kept by its content, since
    /// the file itself may change.
    ///
    /// # Errors
    /// A malformed or unknown reference, or a damaged store or file.
    pub fn resolve(
        &self,
        reference: &str,
        dataset_name: &str,
    ) -> Result<ResolvedPolicy, PolicyError> {
        let Some(stored) = StoredReference::parse(reference)? else {
            let (policy, reference) = self.unversioned(reference.trim())?;
            return Ok(ResolvedPolicy { id: policy.id(), policy, version: 0, reference });
        };
        let version = self.stored(stored, dataset_name)?;
        let reference = match version.version {
            0 => version.policy.name().to_owned(),
            number => format!("{}@{number}", version.name),
        };
        let PolicyVersion { policy, id, version, .. } = version;
        Ok(ResolvedPolicy { policy, id, version, reference })
    }

    /// A policy outside of the lineages, and the reference that always means it.
    fn unversioned(&self, reference: &str) -> Result<(Policy, String), PolicyError> {
        if let Some(builtin) = builtin::builtin(reference)? {
            let name = builtin.name().to_owned();
            return Ok((builtin, name));
        }
        if let Some(id) = reference.strip_prefix(BY_ID_PREFIX) {
            let id = PolicyId::from_hex(id).ok_or_else(|| {
                PolicyError::malformed(format!("'{reference}' is no id: 32 hexadecimal digits"))
            })?;
            let policy = store_files::read_by_id(&self.dir.join(BY_ID_DIR), id)?;
            return Ok((policy, reference.to_owned()));
        }
        let policy = builtin::load_reference(reference)?;
        let _writer = self.lock()?;
        store_files::keep_by_id(&self.dir.join(BY_ID_DIR), &policy)?;
        let reference = format!("{BY_ID_PREFIX}{}", policy.id());
        Ok((policy, reference))
    }

    /// The version that a reference into the store means. `NAME@active` of a name that is
    /// neither `dataset_name` nor in the store is an error, so that a typing mistake does not
    /// quietly mean `none`.
    ///
    /// # Errors
    /// No such name or version, or it is damaged.
    pub fn stored(
        &self,
        reference: StoredReference<'_>,
        dataset_name: &str,
    ) -> Result<PolicyVersion, PolicyError> {
        let (name, version) = match reference {
            StoredReference::Active => (dataset_name, None),
            StoredReference::Named { name, version } => (name, version),
        };
        check_name(name)?;
        if version != Some(0) && name != dataset_name && !self.lineage_dir(name).is_dir() {
            let names = self.names()?;
            let names: Vec<&str> = names.iter().map(String::as_str).chain([dataset_name]).collect();
            return Err(PolicyError::not_found(format!(
                "no policy was ever published for '{name}'; {}",
                suggestion(name, &names)
            )));
        }
        match version {
            Some(version) => self.get(name, version),
            None => self.active(name),
        }
    }

    /// The folder of a name that [`check_name`] accepts.
    fn lineage_dir(&self, name: &str) -> PathBuf {
        self.dir.join(Path::new(name))
    }

    fn lock(&self) -> Result<WriteLock, PolicyError> {
        WriteLock::take(&self.dir)
    }

    fn change(
        &self,
        name: &str,
        edit: impl FnOnce(&mut Head, String) -> Result<(), PolicyError>,
    ) -> Result<Head, PolicyError> {
        check_name(name)?;
        let _writer = self.lock()?;
        let mut head = self.head(name)?;
        edit(&mut head, rfc3339_utc(SystemTime::now()))?;
        let dir = self.lineage_dir(name);
        store_files::create_dir(&dir)?;
        store_files::write_head(&dir, name, &head)?;
        Ok(head)
    }
}

/// Names become folders: letters, digits, `.`, `_` and `-`, with no dot in front.
fn check_name(name: &str) -> Result<(), PolicyError> {
    let is_fit = |char: char| char.is_ascii_alphanumeric() || "._-".contains(char);
    let is_good = !name.is_empty()
        && name.len() <= limits::NAME_BYTES_MAX
        && !name.starts_with('.')
        && name.chars().all(is_fit);
    if is_good {
        return Ok(());
    }
    let shown: String = name.chars().take(40).collect();
    Err(PolicyError::malformed(format!(
        "'{}' is no dataset name: it must have 1 to {} of the characters A-Z a-z 0-9 . _ - and \
         must not start with a dot",
        shown.escape_debug(),
        limits::NAME_BYTES_MAX
    )))
}
