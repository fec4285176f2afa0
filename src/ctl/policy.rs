//! `fastaa-ctl policy`: show, compare, publish and choose policies.
//!
//! Built-ins and files need no daemon: they are read here, and sent by content where the daemon
//! is to have them.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use super::daemon::connect;
use super::{Context, CtlError, output, policy_text};
use crate::control::{
    ControlClient, PolicyHeadReport, PolicyVersionReport, Reply, Request, version_report,
};
use crate::policy::{self, Policy, StoredReference};

/// Subcommands of `policy`.
///
/// A REF is `active`, NAME@VERSION, NAME@active, a built-in (none, trivial-wide,
/// randaugment(n,m), autoaugment-cifar10, autoaugment-imagenet, autoaugment-svhn) or the path of
/// a policy file.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show one policy: what it is, where it comes from, its sub-policies
    Show {
        /// active, NAME@VERSION, NAME@active, a built-in's name, or a policy file
        #[arg(value_name = "REF", default_value = "active")]
        reference: String,
        #[command(flatten)]
        dataset: DatasetArg,
    },
    /// List the versions in the daemon's store
    List(DatasetArg),
    /// Compare two policies
    Diff {
        /// The first policy, as for `show`
        #[arg(value_name = "A")]
        from: String,
        /// The second policy, as for `show`
        #[arg(value_name = "B")]
        to: String,
        #[command(flatten)]
        dataset: DatasetArg,
    },
    /// Store a policy file (or a built-in) as a new version, active unless another is pinned
    Publish {
        /// A policy file in JSON or list-of-lists form, or a built-in's name
        #[arg(value_name = "FILE")]
        file: String,
        #[command(flatten)]
        dataset: DatasetArg,
    },
    /// Hold a version active, whatever is published
    Pin {
        /// NAME@VERSION, VERSION, active, or none
        #[arg(value_name = "REF")]
        reference: String,
        #[command(flatten)]
        dataset: DatasetArg,
    },
    /// Let go of the pinned version
    Unpin(DatasetArg),
    /// Return to the version that was active before
    Rollback(DatasetArg),
    /// Write a policy as a file
    Export {
        /// As for `show`
        #[arg(value_name = "REF")]
        reference: String,
        /// Where to; stdout if not given
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// The JSON form, or the bare list of lists where that can express the policy
        #[arg(long, value_enum, default_value_t = ExportFormat::Json)]
        format: ExportFormat,
        #[command(flatten)]
        dataset: DatasetArg,
    },
}

/// Which dataset's policy is meant.
#[derive(Debug, clap::Args)]
pub(crate) struct DatasetArg {
    /// Whose policy; needed where the daemon has several datasets
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
}

/// Form of an exported policy.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum ExportFormat {
    /// The JSON form.
    Json,
    /// A list of lists of [name, probability, magnitude].
    List,
}

pub(crate) fn run(context: &Context, command: PolicyCommand) -> Result<(), CtlError> {
    match command {
        PolicyCommand::Show { reference, dataset } => show(context, &reference, dataset),
        PolicyCommand::List(dataset) => list(context, dataset),
        PolicyCommand::Diff { from, to, dataset } => {
            diff(context, &from, &to, dataset.dataset.as_deref())
        }
        PolicyCommand::Publish { file, dataset } => publish(context, &file, dataset),
        PolicyCommand::Pin { reference, dataset } => {
            change(context, &Request::PolicyPin { dataset: dataset.dataset, reference })
        }
        PolicyCommand::Unpin(dataset) => {
            change(context, &Request::PolicyUnpin { dataset: dataset.dataset })
        }
        PolicyCommand::Rollback(dataset) => {
            change(context, &Request::PolicyRollback { dataset: dataset.dataset })
        }
        PolicyCommand::Export { reference, output, format, dataset } => {
            let (_, policy) = fetch(context, &reference, dataset.dataset.as_deref())?;
            let text = match format {
                ExportFormat::Json => policy::to_text(&policy),
                ExportFormat::List => policy::to_list_text(&policy)?,
            };
            match output {
                None => output::print(&text),
                Some(path) => output::replace_file(&path, |mut file| {
                    std::io::Write::write_all(&mut file, text.as_bytes())
                })
                .map_err(|error| {
                    CtlError::failed(format!("cannot write {}: {error}", path.display()))
                }),
            }
        }
    }
}

/// The policy that a reference means: from the daemon's store, or read here without a daemon.
pub(crate) fn fetch(
    context: &Context,
    reference: &str,
    dataset: Option<&str>,
) -> Result<(PolicyVersionReport, Policy), CtlError> {
    if StoredReference::parse(reference)?.is_none() {
        let policy = policy::load_reference(reference)?;
        return Ok((version_report(reference.trim(), &policy), policy));
    }
    let mut client = connect(context)?;
    let request = Request::PolicyShow {
        reference: reference.trim().to_owned(),
        dataset: dataset.map(str::to_owned),
    };
    match client.call(&request)? {
        Reply::PolicyVersion(report) => {
            let policy = policy::from_value(&report.policy, "unnamed")?;
            Ok((report, policy))
        }
        other => Err(client.unexpected(&other).into()),
    }
}

fn show(context: &Context, reference: &str, dataset: DatasetArg) -> Result<(), CtlError> {
    let (report, policy) = fetch(context, reference, dataset.dataset.as_deref())?;
    if context.json {
        return output::print_json(&report);
    }
    output::print(&policy_text::show(&report, &policy))
}

fn list(context: &Context, dataset: DatasetArg) -> Result<(), CtlError> {
    let mut client = connect(context)?;
    match client.call(&Request::PolicyList { dataset: dataset.dataset })? {
        Reply::PolicyList { lineages } if context.json => output::print_json(&lineages),
        Reply::PolicyList { lineages } => output::print(&policy_text::list(&lineages)),
        other => Err(client.unexpected(&other).into()),
    }
}

fn diff(context: &Context, from: &str, to: &str, dataset: Option<&str>) -> Result<(), CtlError> {
    let (_, from) = fetch(context, from, dataset)?;
    let (_, to) = fetch(context, to, dataset)?;
    let diff = policy::diff(&from, &to);
    if context.json {
        return output::print_json(&diff.to_json());
    }
    output::print(&diff.to_string())
}

fn publish(context: &Context, file: &str, dataset: DatasetArg) -> Result<(), CtlError> {
    let policy = policy::load_reference(file)?;
    let mut client = connect(context)?;
    let request = Request::PolicyPublish {
        dataset: dataset.dataset,
        policy: policy::to_value(&policy),
        evidence: json!({"published_by": "fastaa-ctl", "file": file}),
    };
    match client.call(&request)? {
        Reply::PolicyPublished(report) if context.json => output::print_json(&report),
        Reply::PolicyPublished(report) => {
            let state = match (report.is_new, report.is_active) {
                (true, true) => "published and active from the next epoch",
                (true, false) => "published, but another version is pinned",
                (false, true) => "active already, with the same content",
                (false, false) => "there already, with the same content; another is pinned",
            };
            output::print(&format!("{}@{}: {state}", report.dataset, report.version))
        }
        other => Err(client.unexpected(&other).into()),
    }
}

/// Pin, unpin or rollback.
fn change(context: &Context, request: &Request) -> Result<(), CtlError> {
    let mut client: ControlClient = connect(context)?;
    match client.call(request)? {
        Reply::PolicyHead(report) if context.json => output::print_json(&report),
        Reply::PolicyHead(report) => output::print(&head_text(&report)),
        other => Err(client.unexpected(&other).into()),
    }
}

fn head_text(report: &PolicyHeadReport) -> String {
    let pin = if report.pinned.is_some() { ", pinned" } else { "" };
    format!("{}@{}: active from the next epoch{pin}", report.dataset, report.active_version)
}
