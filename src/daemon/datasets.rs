//! The configured datasets, opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};

use crate::config::DatasetConfig;
use crate::dataset::{DatasetError, Split, list_splits, open_split};
use crate::policy::suggestion;
use crate::transport::wire::{ErrorCode, Refusal};

/// One opened split.
#[derive(Clone, Debug)]
pub(super) struct OpenedSplit {
    pub(super) dataset: String,
    pub(super) split: String,
    pub(super) path: PathBuf,
    pub(super) data: Arc<dyn Split>,
}

/// All of them, in the order of the configuration.
#[derive(Clone, Debug)]
pub(super) struct Datasets(pub(super) Arc<[OpenedSplit]>);

/// A dataset that cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("dataset '{name}': {source}")]
pub(super) struct OpenDatasetError {
    name: String,
    #[source]
    source: DatasetError,
}

impl Datasets {
    /// Opens every split of every dataset.
    pub(super) fn open(
        configs: &[DatasetConfig],
        cache_dir: &Path,
    ) -> Result<Self, OpenDatasetError> {
        let mut opened = Vec::new();
        for config in configs {
            let failed = |source| OpenDatasetError { name: config.name.clone(), source };
            for (split, path) in splits_of(config).map_err(failed)? {
                let data = open_split(&path, &split, cache_dir).map_err(failed)?;
                let split_info = data.info();
                info!(
                    dataset = config.name,
                    split,
                    format = split_info.format,
                    n_samples = split_info.n_samples,
                    images = ?split_info.images,
                    "dataset opened"
                );
                opened.push(OpenedSplit { dataset: config.name.clone(), split, path, data });
            }
        }
        warn_of_other_classes(&opened);
        Ok(Self(opened.into()))
    }

    /// The names of the datasets, each once.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.0.iter().map(|split| split.dataset.clone()).collect();
        names.dedup();
        names
    }

    /// A split's data by name.
    pub(super) fn find(&self, dataset: &str, split: &str) -> Result<Arc<dyn Split>, Refusal> {
        self.find_opened(dataset, split).map(|opened| Arc::clone(&opened.data))
    }

    /// A split by name.
    pub(super) fn find_opened(&self, dataset: &str, split: &str) -> Result<&OpenedSplit, Refusal> {
        let of_dataset: Vec<&OpenedSplit> =
            self.0.iter().filter(|opened| opened.dataset == dataset).collect();
        if of_dataset.is_empty() {
            let names = self.names();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let message = format!("no dataset '{dataset}'; {}", suggestion(dataset, &names));
            return Err(Refusal::new(ErrorCode::NotFound, message)
                .with_hint("datasets are listed in the daemon's configuration"));
        }
        let found = of_dataset.iter().find(|opened| opened.split == split);
        found.copied().ok_or_else(|| {
            let names: Vec<&str> = of_dataset.iter().map(|opened| opened.split.as_str()).collect();
            let message = format!(
                "dataset '{dataset}' has no split '{split}'; {}",
                suggestion(split, &names)
            );
            Refusal::new(ErrorCode::NotFound, message)
                .with_hint("splits are listed in the daemon's configuration")
        })
    }
}

/// Labels are numbers of a split's own classes: where two splits of a dataset have other ones, the
/// same number means two things.
fn warn_of_other_classes(opened: &[OpenedSplit]) {
    for pair in opened.windows(2) {
        let [first, second] = pair else { continue };
        let (a, b) = (&first.data.info().class_names, &second.data.info().class_names);
        if first.dataset == second.dataset && !a.is_empty() && !b.is_empty() && a != b {
            let only = |some: &[String], others: &[String]| {
                let names = some.iter().filter(|name| !others.contains(name)).take(5);
                names.map(|name| name.escape_debug().to_string()).collect::<Vec<_>>().join(", ")
            };
            warn!(
                dataset = first.dataset,
                "splits '{}' and '{}' have other classes, so the same label means two things; only \
                 the first has: {}; only the second: {}; give both the same class folders",
                first.split,
                second.split,
                only(a, b),
                only(b, a)
            );
        }
    }
}

fn splits_of(config: &DatasetConfig) -> Result<Vec<(String, PathBuf)>, DatasetError> {
    let Some(path) = &config.path else {
        return Ok(config
            .splits()
            .map(|(split, path)| (split.to_owned(), path.to_owned()))
            .collect());
    };
    Ok(list_splits(path)?.into_iter().map(|split| (split, path.clone())).collect())
}
