//! The policy requests, answered from the store.
//!
//! Owns the translation between the store and the control messages. Never reads policy files for
//! a peer: the daemon may see files that the peer may not.

use serde_json::Value;

use super::messages::{
    ControlFailure, FailureCode, LineageReport, PolicyHeadReport, PolicyPublishedReport,
    PolicyReport, PolicyVersionReport, Reply, Request, VersionSummary,
};
use crate::policy::{self, Head, PolicyError, PolicyStore, PolicyVersion, StoredReference};

/// Answers the policy requests; `datasets` are the configured names.
///
/// # Errors
/// What the peer is to be told; `internal` for a request that is not about policies.
pub fn handle_policy(
    store: &PolicyStore,
    datasets: &[String],
    request: Request,
) -> Result<Reply, ControlFailure> {
    match request {
        Request::PolicyShow { reference, dataset } => {
            show(store, datasets, &reference, dataset.as_deref()).map(Reply::PolicyVersion)
        }
        Request::PolicyList { dataset } => {
            let names = match &dataset {
                Some(_) => vec![choose_dataset(datasets, dataset.as_deref())?],
                None => datasets.iter().map(String::as_str).collect(),
            };
            let lineages =
                names.into_iter().map(|name| lineage(store, name)).collect::<Result<_, _>>()?;
            Ok(Reply::PolicyList { lineages })
        }
        Request::PolicyPublish { dataset, policy, evidence } => {
            let dataset = choose_dataset(datasets, dataset.as_deref())?;
            publish(store, dataset, &policy, evidence).map(Reply::PolicyPublished)
        }
        Request::PolicyPin { dataset, reference } => {
            let (dataset, version) =
                version_to_pin(store, datasets, dataset.as_deref(), &reference)?;
            Ok(head_reply(dataset, &store.pin(dataset, version).map_err(failure)?))
        }
        Request::PolicyUnpin { dataset } => {
            let dataset = choose_dataset(datasets, dataset.as_deref())?;
            Ok(head_reply(dataset, &store.unpin(dataset).map_err(failure)?))
        }
        Request::PolicyRollback { dataset } => {
            let dataset = choose_dataset(datasets, dataset.as_deref())?;
            Ok(head_reply(dataset, &store.rollback(dataset).map_err(failure)?))
        }
        _ => Err(ControlFailure::new(FailureCode::Internal, "not a request about policies")),
    }
}

/// The active policy of each dataset, for the status page. A damaged one is reported as such.
pub fn policy_reports(store: &PolicyStore, datasets: &[String]) -> Vec<PolicyReport> {
    let report = |dataset: &String| -> Result<PolicyReport, PolicyError> {
        let head = store.head(dataset)?;
        let version = store.get(dataset, head.active)?;
        Ok(PolicyReport {
            dataset: dataset.clone(),
            active_version: head.active,
            pinned: head.pinned,
            name: version.policy.name().to_owned(),
            id: version.id.to_string(),
            n_sub_policies: version.policy.sub_policies().len() as u64,
            published_at: version.published_at,
            problem: None,
        })
    };
    let or_problem = |dataset: &String| {
        report(dataset).unwrap_or_else(|error| PolicyReport {
            dataset: dataset.clone(),
            problem: Some(error.to_string()),
            ..PolicyReport::default()
        })
    };
    datasets.iter().map(or_problem).collect()
}

/// What is known of a built-in or a file, which has no version.
pub fn version_report(reference: &str, policy: &policy::Policy) -> PolicyVersionReport {
    PolicyVersionReport {
        reference: reference.to_owned(),
        id: policy.id().to_string(),
        policy: policy::to_value(policy),
        ..PolicyVersionReport::default()
    }
}

/// The dataset that a request means.
fn choose_dataset<'a>(
    datasets: &'a [String],
    wanted: Option<&str>,
) -> Result<&'a str, ControlFailure> {
    let names: Vec<&str> = datasets.iter().map(String::as_str).collect();
    match wanted {
        Some(wanted) => names.iter().find(|name| **name == wanted).copied().ok_or_else(|| {
            let message = format!("there is no dataset '{wanted}'");
            ControlFailure::new(FailureCode::NotFound, message)
                .with_hint(policy::suggestion(wanted, &names))
        }),
        None => match names.as_slice() {
            [only] => Ok(only),
            [] => Err(ControlFailure::new(FailureCode::NotFound, "the daemon has no dataset")),
            _ => {
                let message = "the daemon has several datasets, so the request must name one";
                Err(ControlFailure::new(FailureCode::Invalid, message)
                    .with_hint(format!("add --dataset, one of: {}", names.join(", "))))
            }
        },
    }
}

fn show(
    store: &PolicyStore,
    datasets: &[String],
    reference: &str,
    dataset: Option<&str>,
) -> Result<PolicyVersionReport, ControlFailure> {
    let reference = reference.trim();
    let Some(stored) = StoredReference::parse(reference).map_err(failure)? else {
        if let Some(builtin) = policy::builtin(reference).map_err(failure)? {
            return Ok(version_report(builtin.name(), &builtin));
        }
        let message = format!("'{reference}' is no built-in policy and no NAME@VERSION");
        return Err(ControlFailure::new(FailureCode::NotFound, message)
            .with_hint(policy::suggestion(reference, &policy::BUILTIN_NAMES)));
    };
    let dataset = match (stored, dataset) {
        (StoredReference::Named { name, .. }, None) => choose_dataset(datasets, Some(name))?,
        _ => choose_dataset(datasets, dataset)?,
    };
    let version = store.stored(stored, dataset).map_err(failure)?;
    // A damaged active.json must not hide a version that can be read.
    let head = store.head(&version.name).ok();
    let number = version.version;
    Ok(PolicyVersionReport {
        reference: format!("{}@{number}", version.name),
        version: number,
        id: version.id.to_string(),
        policy: policy::to_value(&version.policy),
        evidence: version.evidence,
        published_at: version.published_at,
        parent: version.parent,
        is_active: head.as_ref().is_some_and(|head| head.active == number),
        is_pinned: head.is_some_and(|head| head.pinned == Some(number)),
        dataset: Some(version.name),
    })
}

fn lineage(store: &PolicyStore, dataset: &str) -> Result<LineageReport, ControlFailure> {
    let (head, problem) = match store.head(dataset) {
        Ok(head) => (Some(head), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let versions = store.list(dataset).map_err(failure)?;
    let versions = versions.into_iter().map(|(version, found)| summary(version, found)).collect();
    Ok(LineageReport {
        dataset: dataset.to_owned(),
        active_version: head.as_ref().map(|head| head.active),
        pinned: head.and_then(|head| head.pinned),
        problem,
        versions,
    })
}

fn summary(version: u64, found: Result<PolicyVersion, PolicyError>) -> VersionSummary {
    match found {
        Ok(found) => VersionSummary {
            version,
            name: found.policy.name().to_owned(),
            id: found.id.to_string(),
            n_sub_policies: found.policy.sub_policies().len() as u64,
            published_at: found.published_at,
            parent: found.parent,
            problem: None,
        },
        Err(error) => {
            let problem = Some(error.to_string());
            VersionSummary { version, problem, ..VersionSummary::default() }
        }
    }
}

fn publish(
    store: &PolicyStore,
    dataset: &str,
    policy: &Value,
    evidence: Value,
) -> Result<PolicyPublishedReport, ControlFailure> {
    let policy = policy::from_value(policy, "unnamed").map_err(failure)?;
    let published = store.publish(dataset, &policy, evidence).map_err(failure)?;
    Ok(PolicyPublishedReport {
        dataset: dataset.to_owned(),
        version: published.version.version,
        id: published.version.id.to_string(),
        is_new: published.is_new,
        is_active: published.is_active,
    })
}

/// `NAME@VERSION`, `VERSION`, `active`, or `none`.
fn version_to_pin<'a>(
    store: &PolicyStore,
    datasets: &'a [String],
    dataset: Option<&str>,
    reference: &str,
) -> Result<(&'a str, u64), ControlFailure> {
    let reference = reference.trim();
    if reference == "none" {
        return Ok((choose_dataset(datasets, dataset)?, 0));
    }
    if let Ok(version) = reference.parse() {
        return Ok((choose_dataset(datasets, dataset)?, version));
    }
    match StoredReference::parse(reference).map_err(failure)? {
        Some(stored @ StoredReference::Named { name, .. }) => {
            let chosen = choose_dataset(datasets, Some(name))?;
            if dataset.is_some_and(|dataset| dataset != name) {
                let message = format!(
                    "'{reference}' is a version of '{name}', not of '{}'",
                    dataset.unwrap_or_default()
                );
                return Err(ControlFailure::new(FailureCode::Invalid, message)
                    .with_hint("policies of other datasets can be exported and then published"));
            }
            Ok((chosen, store.stored(stored, chosen).map_err(failure)?.version))
        }
        Some(StoredReference::Active) => {
            let chosen = choose_dataset(datasets, dataset)?;
            Ok((chosen, store.head(chosen).map_err(failure)?.active))
        }
        None => {
            let message = format!("'{reference}' is no version in the store");
            Err(ControlFailure::new(FailureCode::Invalid, message)
                .with_hint("publish it first, then pin NAME@VERSION"))
        }
    }
}

fn head_reply(dataset: &str, head: &Head) -> Reply {
    Reply::PolicyHead(PolicyHeadReport {
        dataset: dataset.to_owned(),
        active_version: head.active,
        pinned: head.pinned,
    })
}

fn failure(error: PolicyError) -> ControlFailure {
    let code = match error {
        PolicyError::Invalid { .. } | PolicyError::Malformed { .. } => FailureCode::Invalid,
        PolicyError::NotFound { .. } => FailureCode::NotFound,
        PolicyError::Conflict { .. } => FailureCode::Conflict,
        PolicyError::Io { .. } | PolicyError::Damaged { .. } => FailureCode::Internal,
    };
    ControlFailure::new(code, error.to_string())
}
