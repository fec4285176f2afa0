//! Worker threads that turn batch jobs into bytes in lent memory.
//!
//! A job is cut into chunks of samples; chunks go through one bounded queue to all workers, each
//! writes its samples into its own part of the batch, and the worker that finishes the last chunk
//! reports the job. The submitter never blocks: it keeps what the queue does not take.
//!
//! Owns the threads and the queue. Never decides what is computed next, or where it goes.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use crate::augment::PreparedPolicy;
use crate::dataset::Split;
use crate::limits::CHUNK_QUEUE_MAX;

use super::ahead::{Ahead, Soon};
use super::gaps::{Part, close_gaps, skipped_mark};
use super::order::EpochOrder;
use super::recipe::OnError;
use super::render::{CompiledRecipe, SampleKey};
use super::sample::{BadSamples, Made, SampleScratch, make_sample};
use super::shared::Membership;

/// A chunk is about this many bytes of pixels: large against the cost of a queue operation, small
/// enough that the last chunk of a batch does not keep the batch waiting.
const CHUNK_BYTES: usize = 128 * 1024;

/// All that the samples of one stream have in common.
#[derive(Debug)]
pub struct StreamSpec {
    /// Where samples come from.
    pub split: Arc<dyn Split>,
    /// What happens to them.
    pub recipe: CompiledRecipe,
    /// Keys order and draws.
    pub seed: u64,
    /// Keyed order, or index order.
    pub shuffle: bool,
    /// The stream's part in the window of shared images; `None` where nothing is decoded.
    pub shared: Option<Membership>,
    /// What happens with a sample that cannot be read.
    pub on_error: OnError,
    /// Who is told of it.
    pub bad_samples: Option<Arc<dyn BadSamples>>,
}

/// Memory for one batch. The three parts are as long as the batch needs, no longer.
#[derive(Debug)]
pub struct BatchOutput {
    /// `n * pixel_bytes`.
    pub pixels: &'static mut [u8],
    /// `n * label_bytes`.
    pub labels: &'static mut [u8],
    /// `n * 8`: sample indices as `i64`.
    pub indices: &'static mut [u8],
    /// Keeps the memory alive for as long as any part of the job lives.
    pub keep_alive: Arc<dyn Any + Send + Sync>,
}

/// One batch to make.
#[derive(Debug)]
pub struct BatchJob {
    /// The stream it belongs to.
    pub spec: Arc<StreamSpec>,
    /// Order of the epoch.
    pub order: Arc<EpochOrder>,
    /// Which epoch.
    pub epoch: u64,
    /// First position in the order.
    pub first_position: u64,
    /// Policy of the epoch.
    pub policy: Arc<PreparedPolicy>,
    /// Handed back with the result.
    pub tag: JobTag,
}

/// What the submitter needs to recognise a finished job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobTag {
    /// Which consumer.
    pub session: u64,
    /// Which of its starts.
    pub seek: u32,
    /// Which step.
    pub step: u64,
    /// Which slot.
    pub slot: u32,
}

/// A job that is done, well or not.
#[derive(Debug)]
pub struct FinishedJob {
    /// Of the job.
    pub tag: JobTag,
    /// The first error of any of its samples.
    pub error: Option<String>,
}

/// Counters of the pool, since its start.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Samples written.
    pub samples: AtomicU64,
    /// Nanoseconds spent on them, all threads together.
    pub busy_ns: AtomicU64,
    /// Chunks whose code panicked.
    pub panics: AtomicU64,
    /// Samples in whose place another one came.
    pub substituted: AtomicU64,
    /// Samples that were left out.
    pub skipped: AtomicU64,
}

/// What the chunks of a job share. Dropping the last reference reports the job: nothing can touch
/// its memory any more then, and the loan has ended.
struct SharedJob {
    job: BatchJob,
    error: Mutex<Option<String>>,
    /// The finished parts of a batch that may have gaps.
    parts: Mutex<Vec<Part>>,
    keep_alive: Option<Arc<dyn Any + Send + Sync>>,
    reporter: Arc<Reporter>,
}

impl Drop for SharedJob {
    fn drop(&mut self) {
        let shape = self.job.spec.recipe.shape();
        let parts = self.parts.get_mut().unwrap_or_else(PoisonError::into_inner);
        close_gaps(&mut std::mem::take(parts), shape.pixel_bytes(), shape.label_bytes());
        self.keep_alive = None;
        let error = self.error.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // Without a receiver the pool is going away, and nobody wants to know.
        let _ = self.reporter.finished.send(FinishedJob { tag: self.job.tag, error });
        (self.reporter.wake)();
    }
}

struct Reporter {
    finished: Sender<FinishedJob>,
    wake: Box<dyn Fn() + Send + Sync>,
}

struct Chunk {
    shared: Arc<SharedJob>,
    first_position: u64,
    pixels: &'static mut [u8],
    labels: &'static mut [u8],
    indices: &'static mut [u8],
}

/// The worker threads. Dropping it ends them after the chunks in the queue.
pub struct WorkerPool {
    chunks: Option<Sender<Chunk>>,
    backlog: VecDeque<Chunk>,
    finished: Receiver<FinishedJob>,
    reporter: Arc<Reporter>,
    threads: Vec<JoinHandle<()>>,
    counters: Arc<WorkerCounters>,
    ahead: Ahead,
}

impl WorkerPool {
    /// Starts `n_threads` workers; each calls `wake` after it has reported a finished job.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(
        n_threads: usize,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (chunk_sender, chunk_receiver) = bounded::<Chunk>(CHUNK_QUEUE_MAX);
        let (finished_sender, finished) = bounded(CHUNK_QUEUE_MAX);
        let reporter = Arc::new(Reporter { finished: finished_sender, wake: Box::new(wake) });
        let counters = Arc::new(WorkerCounters::default());
        let threads = (0..n_threads)
            .map(|thread_idx| {
                let (chunks, counters) = (chunk_receiver.clone(), Arc::clone(&counters));
                std::thread::Builder::new()
                    .name(format!("worker-{thread_idx}"))
                    .spawn(move || work(&chunks, &counters))
            })
            .collect::<Result<_, _>>()?;
        let (chunks, backlog) = (Some(chunk_sender), VecDeque::new());
        let ahead = Ahead::start()?;
        Ok(Self { chunks, backlog, finished, reporter, threads, counters, ahead })
    }

    /// Number of threads.
    pub fn n_threads(&self) -> usize {
        self.threads.len()
    }

    /// The pool's counters.
    pub fn counters(&self) -> &Arc<WorkerCounters> {
        &self.counters
    }

    /// Takes a job. Never blocks; `output` has room for at least one sample.
    pub fn submit(&mut self, job: BatchJob, output: BatchOutput) {
        let shape = *job.spec.recipe.shape();
        let (pixel_bytes, label_bytes) = (shape.pixel_bytes(), shape.label_bytes());
        let n_samples = output.indices.len() / size_of::<i64>();
        assert!(n_samples > 0, "a job has samples");
        assert_eq!(output.pixels.len(), n_samples * pixel_bytes, "room for all pixels");
        assert_eq!(output.labels.len(), n_samples * label_bytes, "room for all labels");
        let per_chunk = (CHUNK_BYTES / pixel_bytes.max(1)).clamp(1, n_samples);
        // Pairs that are mixed must not be cut.
        let per_chunk =
            if job.spec.recipe.mixes() { per_chunk.next_multiple_of(2) } else { per_chunk };
        let first_position = job.first_position;
        self.ahead.offer(|| Soon {
            spec: Arc::clone(&job.spec),
            order: Arc::clone(&job.order),
            first_position,
            n_samples: n_samples as u64,
        });
        let shared = Arc::new(SharedJob {
            job,
            error: Mutex::new(None),
            parts: Mutex::default(),
            keep_alive: Some(output.keep_alive),
            reporter: Arc::clone(&self.reporter),
        });
        let pixels = output.pixels.chunks_mut(per_chunk * pixel_bytes);
        let labels = output.labels.chunks_mut(per_chunk * label_bytes);
        let indices = output.indices.chunks_mut(per_chunk * size_of::<i64>());
        let mut position = first_position;
        for ((pixels, labels), indices) in pixels.zip(labels).zip(indices) {
            let n_in_chunk = (indices.len() / size_of::<i64>()) as u64;
            let shared = Arc::clone(&shared);
            self.backlog.push_back(Chunk {
                shared,
                first_position: position,
                pixels,
                labels,
                indices,
            });
            position += n_in_chunk;
        }
        self.feed();
    }

    /// The next finished job, if there is one; also refills the queue.
    pub fn try_finished(&mut self) -> Option<FinishedJob> {
        self.feed();
        self.finished.try_recv().ok()
    }

    fn feed(&mut self) {
        let Some(chunks) = &self.chunks else { return };
        while let Some(chunk) = self.backlog.pop_front() {
            match chunks.try_send(chunk) {
                Ok(()) => {}
                Err(TrySendError::Full(chunk) | TrySendError::Disconnected(chunk)) => {
                    self.backlog.push_front(chunk);
                    return;
                }
            }
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        // A worker may wait for room to report: without a receiver it does not.
        let (_, no_reports) = bounded(0);
        self.finished = no_reports;
        self.backlog.clear();
        self.chunks = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn work(chunks: &Receiver<Chunk>, counters: &WorkerCounters) {
    let mut scratch = SampleScratch::default();
    while let Ok(mut chunk) = chunks.recv() {
        let started = std::time::Instant::now();
        let n_samples = (chunk.indices.len() / size_of::<i64>()) as u64;
        let result =
            catch_unwind(AssertUnwindSafe(|| render_chunk(&mut chunk, &mut scratch, counters)));
        let error = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error),
            Err(panic) => {
                counters.panics.fetch_add(1, Ordering::Relaxed);
                scratch = SampleScratch::default();
                Some(format!("a worker panicked: {}", panic_text(panic.as_ref())))
            }
        };
        let busy_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counters.busy_ns.fetch_add(busy_ns, Ordering::Relaxed);
        counters.samples.fetch_add(n_samples, Ordering::Relaxed);
        if let Some(error) = error {
            let mut first = chunk.shared.error.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error);
        } else if chunk.shared.job.spec.on_error == OnError::Skip {
            let Chunk { shared, first_position, pixels, labels, indices } = chunk;
            let part = Part { first_position, pixels, labels, indices };
            shared.parts.lock().unwrap_or_else(PoisonError::into_inner).push(part);
        }
    }
}

fn render_chunk(
    chunk: &mut Chunk,
    scratch: &mut SampleScratch,
    counters: &WorkerCounters,
) -> Result<(), String> {
    let job = &chunk.shared.job;
    let spec = &job.spec;
    let shape = spec.recipe.shape();
    let places = chunk
        .pixels
        .chunks_exact_mut(shape.pixel_bytes())
        .zip(chunk.labels.chunks_exact_mut(shape.label_bytes()))
        .zip(chunk.indices.chunks_exact_mut(size_of::<i64>()));
    for (position, ((pixels, label), index)) in (chunk.first_position..).zip(places) {
        let sample_idx = job.order.sample_at(position);
        let key = SampleKey { seed: spec.seed, epoch: job.epoch, sample_idx };
        let made = make_sample(spec, &job.policy, key, scratch, pixels, label)?;
        let in_order = i64::try_from(sample_idx).expect("limits::SAMPLES_MAX fits i64");
        let mark = match made {
            Made::Own => in_order,
            Made::Substituted => {
                counters.substituted.fetch_add(1, Ordering::Relaxed);
                in_order
            }
            Made::Skipped => {
                counters.skipped.fetch_add(1, Ordering::Relaxed);
                skipped_mark(in_order)
            }
        };
        index.copy_from_slice(&mark.to_ne_bytes());
    }
    if spec.recipe.mixes() {
        mix_pairs(chunk);
    }
    Ok(())
}

/// Mixes each two samples of a chunk that both are there.
fn mix_pairs(chunk: &mut Chunk) {
    let job = &chunk.shared.job;
    let shape = job.spec.recipe.shape();
    let (pixel_bytes, label_bytes) = (shape.pixel_bytes(), shape.label_bytes());
    let pairs = chunk
        .pixels
        .chunks_exact_mut(2 * pixel_bytes)
        .zip(chunk.labels.chunks_exact_mut(2 * label_bytes))
        .zip(chunk.indices.as_chunks::<8>().0.chunks_exact(2));
    for (position, ((pixels, labels), indices)) in (chunk.first_position..).step_by(2).zip(pairs) {
        if indices.iter().any(|index| i64::from_ne_bytes(*index) < 0) {
            continue;
        }
        let sample_idx = job.order.sample_at(position);
        let key = SampleKey { seed: job.spec.seed, epoch: job.epoch, sample_idx };
        let (a, b) = pixels.split_at_mut(pixel_bytes);
        let (label_a, label_b) = labels.split_at_mut(label_bytes);
        job.spec.recipe.mix(key, [a, b], [label_a, label_b]);
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
