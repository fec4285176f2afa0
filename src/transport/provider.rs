//! What the transport needs to know from above: streams and the policies of their epochs.

use std::sync::Arc;

use crate::augment::PreparedPolicy;
use crate::pipeline::on_device::FinishOnDevice;
use crate::pipeline::render::OutputShape;
use crate::pipeline::workers::StreamSpec;

use super::wire::{ErrorCode, Refusal, StreamRequest};

/// A stream that is ready to be read.
#[derive(Clone, Debug)]
pub struct OpenedStream {
    /// Samples, recipe, seed.
    pub spec: Arc<StreamSpec>,
    /// What the recipe calls its policy.
    pub policy_reference: String,
    /// Epochs of the run; 0: unknown.
    pub total_epochs: u64,
    /// The effective recipe as JSON, for the client.
    pub recipe_json: String,
    /// What finishes batches on the consumer's device; then `spec` makes their first half alone.
    pub finish: Option<Arc<dyn FinishOnDevice>>,
    /// It is to be done only if it is faster.
    pub must_pay: bool,
}

/// What the processors make of a recipe, in images per second, all workers together.
#[derive(Clone, Debug)]
pub struct CpuRates {
    /// With this policy.
    pub policy: Arc<PreparedPolicy>,
    /// Of the whole recipe.
    pub whole: f64,
    /// Of its first half alone.
    pub loading: f64,
}

impl CpuRates {
    /// Whether a device that finishes `finishing` images per second pays: it works beside the
    /// processors, so the slower of the two counts.
    pub fn pays(&self, finishing: f64) -> bool {
        self.loading.min(finishing) > self.whole
    }
}

impl OpenedStream {
    /// Of the batches that the consumer gets.
    pub fn shape(&self) -> &OutputShape {
        let own = || self.spec.recipe.shape();
        self.finish.as_deref().map_or_else(own, FinishOnDevice::shape)
    }
}

/// The policy of one epoch of one run.
#[derive(Clone, Debug)]
pub struct EpochPolicy {
    /// Ready to be applied.
    pub prepared: Arc<PreparedPolicy>,
    /// `NAME@VERSION`, a built-in's name, or `id:` and the content hash of a file.
    pub reference: String,
    /// Content hash.
    pub id: [u8; 16],
    /// Version in the store; 0 for a built-in or a file.
    pub version: u64,
}

/// Whose epochs pin a policy together.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The dataset's name.
    pub dataset: &'a str,
    /// The group's name, or one that no other connection has.
    pub name: &'a str,
    /// It is a group: it outlives the connection.
    pub is_group: bool,
}

/// Finds datasets and policies for the stream server.
pub trait StreamProvider: Send + Sync {
    /// Finds the dataset and compiles the recipe. `has_gpu`: batches may be finished on the
    /// consumer's GPU.
    ///
    /// # Errors
    /// A refusal that the client shows to its user.
    fn open(&self, request: &StreamRequest, has_gpu: bool) -> Result<OpenedStream, Refusal>;

    /// What the processors make of a stream that is finished on a device, and of the whole of it.
    /// Takes a while.
    ///
    /// # Errors
    /// Its policy is not there any more.
    fn measure(&self, stream: &OpenedStream, dataset: &str) -> Result<CpuRates, Refusal>;

    /// The policy of `epoch` in `run`: the one pinned before, or `resumed` (what the client says
    /// the epoch began with), or what the recipe's reference means now.
    ///
    /// # Errors
    /// The reference names nothing.
    fn epoch_policy(
        &self,
        stream: &OpenedStream,
        run: &Run<'_>,
        epoch: u64,
        resumed: &str,
    ) -> Result<EpochPolicy, Refusal>;

    /// A client took a batch, or asked for an epoch, just now. `pid` is its process, if it is on
    /// this host. Called on the server's thread, once per batch: it must not wait.
    fn demanded(&self, pid: Option<i32>);
}

impl Refusal {
    /// A refusal without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: String::new() }
    }

    /// With a hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_pays_if_neither_it_nor_the_loading_is_slower() {
        let policy = Arc::<PreparedPolicy>::default();
        let rates = CpuRates { policy: policy.clone(), whole: 1000.0, loading: 3000.0 };
        assert!(rates.pays(1001.0));
        assert!(!rates.pays(1000.0));
        assert!(!CpuRates { policy, whole: 1000.0, loading: 990.0 }.pays(1e9));
        assert!(!rates.pays(0.0));
    }
}
