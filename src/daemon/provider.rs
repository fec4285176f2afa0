//! Finds datasets and policies for the stream server: names from requests, things from the parts.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use crate::augment::PreparedPolicy;
use crate::config::{AugmentOn, with_suggestion};
use crate::dataset::{ImageKind, Split};
use crate::idle::demand::{Consumer, DemandBoard};
use crate::image::decode::DecodeLimits;
use crate::limits::PREPARED_POLICIES_MAX;
use crate::pipeline::on_device::{FinishOnDevice, loading_half};
use crate::pipeline::recipe::{Recipe, RecipeError};
use crate::pipeline::render::{CompiledRecipe, RenderScratch, SampleKey};
use crate::pipeline::shared::DecodedWindow;
#[cfg(feature = "torch")]
use crate::pipeline::tensor_finish::TensorFinish;
use crate::pipeline::workers::StreamSpec;
use crate::policy::{
    EpochPins, HistoryKind, PolicyError, PolicyStore, ResolvedPolicy, StoredReference, is_path,
};
use crate::transport::provider::{CpuRates, EpochPolicy, OpenedStream, Run, StreamProvider};
use crate::transport::wire::{ErrorCode, Refusal, StreamRequest};

use super::datasets::Datasets;
use super::quarantine::Quarantine;
use super::switching::{ActiveNow, SwitchRules, decide};

/// Samples that are made to measure the processors, and how long that may take.
const MEASURED_SAMPLES_MAX: u64 = 512;
const MEASURED_TIME_MAX: Duration = Duration::from_millis(50);

/// `source` in the evidence of the versions that the search publishes.
const EVIDENCE_OF_SEARCH: &str = "search";

/// See the module.
pub(super) struct Provider {
    pub(super) datasets: Datasets,
    pub(super) defaults: Recipe,
    /// Encoded images beyond them are refused.
    pub(super) limits: DecodeLimits,
    /// Where batches that lie on a GPU are augmented.
    pub(super) augment_on: AugmentOn,
    /// Worker threads.
    pub(super) n_threads: usize,
    /// Samples that cannot be read.
    pub(super) quarantine: Arc<Quarantine>,
    /// Decoded images that streams share.
    pub(super) decoded: Arc<DecodedWindow>,
    pub(super) store: Arc<PolicyStore>,
    pub(super) pins: EpochPins,
    /// Who takes batches, for the search.
    pub(super) demand: Arc<DemandBoard>,
    /// How fast the search's versions reach a run.
    pub(super) rules: SwitchRules,
    /// By canonical reference, which always means the same policy.
    pub(super) prepared: Mutex<HashMap<String, EpochPolicy>>,
}

impl StreamProvider for Provider {
    fn open(&self, request: &StreamRequest, has_gpu: bool) -> Result<OpenedStream, Refusal> {
        let opened = self.datasets.find_opened(&request.dataset, &request.split)?;
        let split = Arc::clone(&opened.data);
        let recipe = self.recipe(&request.recipe_json)?;
        let compiled = CompiledRecipe::new(&recipe, split.info(), self.limits);
        let compiled = compiled.map_err(refuse_recipe)?;
        // A reference that means nothing is refused now, not at the first epoch.
        self.store.resolve(&recipe.policy, &request.dataset).map_err(refuse_policy)?;
        let is_cut = has_gpu && self.augment_on != AugmentOn::Cpu;
        let loading = is_cut.then(|| loading_half(&recipe)).flatten();
        let (compiled, finish) = match loading {
            None => (compiled, None),
            Some(loading) => match on_gpu(compiled, request.seed) {
                Err(compiled) => (*compiled, None),
                Ok(finish) => {
                    let half = CompiledRecipe::new(&loading, split.info(), self.limits);
                    (half.map_err(refuse_recipe)?, Some(finish))
                }
            },
        };
        let recipe_json = serde_json::to_string(&recipe)
            .map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))?;
        let shared = match split.info().images {
            ImageKind::Encoded { .. } => {
                let split_id = Arc::as_ptr(&split).cast::<()>().addr();
                let options = compiled.decode_options();
                Some(self.decoded.join(split_id, options, request.seed, compiled.crop_key()))
            }
            ImageKind::Raw { .. } => None,
        };
        Ok(OpenedStream {
            spec: Arc::new(StreamSpec {
                split,
                recipe: compiled,
                seed: request.seed,
                shuffle: request.shuffle,
                shared,
                on_error: recipe.on_error,
                bad_samples: Some(self.quarantine.of(opened)),
            }),
            policy_reference: recipe.policy,
            total_epochs: recipe.total_epochs,
            recipe_json,
            must_pay: finish.is_some() && self.augment_on == AugmentOn::Auto,
            finish,
        })
    }

    fn demanded(&self, pid: Option<i32>) {
        self.demand.took(Consumer(pid.and_then(|pid| u32::try_from(pid).ok())));
    }

    fn measure(&self, stream: &OpenedStream, dataset: &str) -> Result<CpuRates, Refusal> {
        let policy = self.prepare(&stream.policy_reference, dataset).map_err(refuse_policy)?;
        let StreamSpec { split, recipe: half, .. } = &*stream.spec;
        let whole = stream.finish.as_deref().map_or(half, FinishOnDevice::whole);
        let none = PreparedPolicy::default();
        // The files come from the disk once for both.
        images_per_second(half, &**split, &none);
        let n_threads = self.n_threads as f64;
        Ok(CpuRates {
            whole: n_threads * images_per_second(whole, &**split, &policy.prepared),
            loading: n_threads * images_per_second(half, &**split, &none),
            policy: policy.prepared,
        })
    }

    fn epoch_policy(
        &self,
        stream: &OpenedStream,
        run: &Run<'_>,
        epoch: u64,
        resumed: &str,
    ) -> Result<EpochPolicy, Refusal> {
        let own = stream.policy_reference.as_str();
        let choose = |history: &BTreeMap<u64, String>| {
            if !resumed.is_empty() {
                return Ok(self.store.resolve(resumed, run.dataset)?.reference);
            }
            let now = self.active_now(own, run.dataset)?;
            Ok(decide(history, epoch, stream.total_epochs, self.rules, &now))
        };
        // Only what can come to mean another policy needs a pin: the active one, and files.
        let can_change = own == "active" || own.ends_with("@active") || is_path(own);
        let reference = if can_change {
            self.pins.pinned_or(run.dataset, run.name, run.is_group, epoch, choose)
        } else {
            choose(&BTreeMap::new())
        };
        self.prepare(&reference.map_err(refuse_policy)?, run.dataset).map_err(refuse_policy)
    }
}

impl Provider {
    fn recipe(&self, overrides_json: &str) -> Result<Recipe, Refusal> {
        let overrides: Map<String, Value> =
            serde_json::from_str(overrides_json).map_err(|error| {
                Refusal::new(ErrorCode::Malformed, format!("the recipe is no JSON object: {error}"))
            })?;
        let recipe = self.defaults.overridden(&overrides).map_err(refuse_recipe)?;
        recipe.validate().map_err(refuse_recipe)?;
        Ok(recipe)
    }

    /// What a stream's own reference means now, and whether the search made it so.
    fn active_now(&self, own: &str, dataset: &str) -> Result<ActiveNow, PolicyError> {
        let reference = self.store.resolve(own, dataset)?.reference;
        let is_by_search = match StoredReference::parse(own)? {
            Some(StoredReference::Active) => is_by_search(&self.store, dataset, &reference)?,
            Some(StoredReference::Named { name, version: None }) => {
                is_by_search(&self.store, name, &reference)?
            }
            _ => false,
        };
        Ok(ActiveNow { reference, is_by_search })
    }

    fn prepare(&self, reference: &str, dataset: &str) -> Result<EpochPolicy, PolicyError> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = prepared.get(reference) {
            return Ok(known.clone());
        }
        let ResolvedPolicy { policy, id, version, reference } =
            self.store.resolve(reference, dataset)?;
        let ready = EpochPolicy {
            prepared: Arc::new(PreparedPolicy::new(&policy)),
            reference: reference.clone(),
            id: id.0,
            version,
        };
        if prepared.len() >= PREPARED_POLICIES_MAX {
            prepared.clear();
        }
        prepared.insert(reference, ready.clone());
        Ok(ready)
    }
}

/// Whether `reference`, which is or just was the active policy of `name`, is a version of the
/// search that is active because it was published: neither a pin nor a rollback has chosen it.
fn is_by_search(store: &PolicyStore, name: &str, reference: &str) -> Result<bool, PolicyError> {
    let Some(version) = search_version(store, name, reference)? else { return Ok(false) };
    let head = store.head(name)?;
    let chosen = head.history.iter().rev().find(|entry| entry.version == version);
    Ok(chosen.is_some_and(|entry| entry.kind == HistoryKind::Publish))
}

/// The version that `reference` names, if the search published it under `name`.
pub(super) fn search_version(
    store: &PolicyStore,
    name: &str,
    reference: &str,
) -> Result<Option<u64>, PolicyError> {
    let Some(StoredReference::Named { name: its, version: Some(version) }) =
        StoredReference::parse(reference)?
    else {
        return Ok(None);
    };
    if its != name {
        return Ok(None);
    }
    let found = store.get(name, version)?;
    Ok((found.evidence["source"] == EVIDENCE_OF_SEARCH).then_some(version))
}

fn refuse_recipe(error: RecipeError) -> Refusal {
    Refusal::new(ErrorCode::Invalid, with_suggestion(&error.to_string()))
        .with_hint("recipe keys are those of [stream.defaults] in config/reference.toml")
}

fn refuse_policy(error: PolicyError) -> Refusal {
    let (code, hint) = match error {
        PolicyError::NotFound { .. } => {
            (ErrorCode::NotFound, "'fastaa-ctl policy list' shows the published policies")
        }
        PolicyError::Io { .. } => {
            (ErrorCode::Data, "look at the file and the folder it is in, on the daemon's host")
        }
        PolicyError::Damaged { .. } => (ErrorCode::Data, "the daemon's log may say more"),
        _ => (ErrorCode::Invalid, "'fastaa-ctl policy show none' shows what a policy looks like"),
    };
    Refusal::new(code, error.to_string()).with_hint(hint)
}

/// What finishes batches of the recipe on a GPU; gives it back if this program has no libtorch.
#[cfg(feature = "torch")]
#[allow(clippy::unnecessary_wraps, reason = "the twin without libtorch gives it back")]
fn on_gpu(
    whole: CompiledRecipe,
    seed: u64,
) -> Result<Arc<dyn FinishOnDevice>, Box<CompiledRecipe>> {
    Ok(Arc::new(TensorFinish::new(whole, seed)))
}

/// See the other one.
#[cfg(not(feature = "torch"))]
fn on_gpu(whole: CompiledRecipe, _: u64) -> Result<Arc<dyn FinishOnDevice>, Box<CompiledRecipe>> {
    Err(Box::new(whole))
}

/// How many of the first samples one thread makes per second; 0 if it can make none.
fn images_per_second(recipe: &CompiledRecipe, split: &dyn Split, policy: &PreparedPolicy) -> f64 {
    let (mut scratch, mut file) = (RenderScratch::default(), Vec::new());
    let mut out = vec![0; recipe.shape().pixel_bytes()];
    let (began, mut n_made) = (Instant::now(), 0_u32);
    for sample_idx in 0..split.info().n_samples.min(MEASURED_SAMPLES_MAX) {
        let key = SampleKey { seed: 0, epoch: 0, sample_idx };
        let is_made = split.sample(sample_idx, &mut file).is_ok_and(|sample| {
            recipe.render(&sample, policy, key, &mut scratch, &mut out).is_ok()
        });
        n_made += u32::from(is_made);
        if began.elapsed() > MEASURED_TIME_MAX {
            break;
        }
    }
    f64::from(n_made) / began.elapsed().as_secs_f64()
}
