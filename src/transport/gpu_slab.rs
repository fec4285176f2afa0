//! A session's slab on its consumer's GPU: who gets one, and the words where it fails.
//!
//! Owns nothing; `crate::gpu` has the memory, `session` the slots.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tracing::info;

use crate::augment::PreparedPolicy;
use crate::gpu::{Finish, FinishedLayout, Gpus, Importer, ImporterEnd};
use crate::pipeline::render::SlotLayout;

use super::provider::StreamProvider;
use super::session::Session;
use super::wire::{ErrorCode, GroupMode, Refusal, StreamRequest};

/// Batches that are timed on a GPU.
const TIMED_BATCHES: u32 = 3;

/// Whether a request may have a slab on a GPU at all.
pub(super) fn is_wanted(request: &StreamRequest) -> bool {
    // Members of a group share what is made once, in memory of the host.
    request.gpu.is_some() && (request.mode != GroupMode::Broadcast || request.group.is_empty())
}

/// Gives the session's slab an image on the GPU that it asks for, or notes why there is none. Gives
/// what the client, of this process (a pidfd), is to have to say that it has closed it.
///
/// # Errors
/// No file descriptors left.
pub(super) fn open(
    gpus: &Gpus,
    session: &mut Session,
    process: Option<&Arc<OwnedFd>>,
) -> Result<Option<ImporterEnd>, Refusal> {
    let Some(uuid) = session.request.gpu else { return Ok(None) };
    if !is_wanted(&session.request) {
        session.gpu_refused = "the members of a broadcast group share memory of the host".into();
        return Ok(None);
    }
    let no_files = |error: Errno| {
        Refusal::new(ErrorCode::Exhausted, format!("no pipe for a slab on a GPU: {error}"))
            .with_hint("raise the daemon's limit of open files (LimitNOFILE, ulimit -n)")
    };
    let (importer, pipe) = Importer::new(process.cloned()).map_err(no_files)?;
    let layout = finished_layout(session);
    let finished = layout.map(|layout| {
        let host = session.slab.layout();
        FinishedLayout {
            slot_bytes: layout.slot_bytes,
            labels_from: host.labels_offset,
            labels_to: layout.labels_offset,
            labels_bytes: host.indices_offset - host.labels_offset,
        }
    });
    match gpus.open(uuid, session.id, session.slab.for_gpu(finished), importer) {
        Ok(slab) => {
            session.gpu = Some(slab);
            session.gpu_layout = layout;
            Ok(Some(pipe))
        }
        Err(error) => {
            session.gpu_refused = error.to_string();
            Ok(None)
        }
    }
}

/// Whether finishing batches there makes more images per second, where that is asked; tells which,
/// and why.
///
/// # Errors
/// The policy is not there any more.
pub(super) fn pays(session: &Session, provider: &dyn StreamProvider) -> Result<bool, Refusal> {
    if !session.stream.must_pay {
        return Ok(true);
    }
    let rates = provider.measure(&session.stream, &session.request.dataset)?;
    let timed = time_batch(session, &rates.policy);
    let finishing = timed.as_ref().copied().unwrap_or(0.0);
    let pays = rates.pays(finishing);
    info!(
        chosen = if pays { "gpu" } else { "cpu" },
        problem = timed.err(),
        "augment_on = \"auto\": the processors make {:.0} images/s alone; with the GPU they load \
         {:.0} images/s and it finishes {finishing:.0}",
        rates.whole,
        rates.loading,
    );
    Ok(pays)
}

/// Images per second of a whole batch from the slab until it is finished on the GPU: the best of
/// some, after one that loads what is needed.
fn time_batch(session: &Session, policy: &Arc<PreparedPolicy>) -> Result<f64, String> {
    let (Some(gpu), Some(finish)) = (&session.gpu, &session.stream.finish) else {
        return Err("nothing finishes batches there".to_owned());
    };
    let n_samples = session.stream.spec.split.info().n_samples;
    let samples: Vec<i64> = (0..i64::from(session.request.batch_size))
        .take(usize::try_from(n_samples).unwrap_or(usize::MAX))
        .collect();
    let mut best = Duration::MAX;
    for attempt in 0..=TIMED_BATCHES {
        let (finish, policy, samples) = (Arc::clone(finish), Arc::clone(policy), samples.clone());
        let work: Finish = Box::new(move |place| finish.finish(&policy, 0, &samples, place));
        let took = gpu.time(0, work)?;
        best = if attempt == 0 { best } else { best.min(took) };
    }
    Ok(samples.len() as f64 / best.as_secs_f64())
}

/// The layout of slots that are finished on the GPU: as many samples as in the slab's.
fn finished_layout(session: &Session) -> Option<SlotLayout> {
    let finish = session.stream.finish.as_ref()?;
    let n_samples = session.stream.spec.split.info().n_samples;
    let batch_size = u64::from(session.request.batch_size).min(n_samples);
    SlotLayout::new(finish.shape(), usize::try_from(batch_size).ok()?)
}

/// What a client is told whose GPU fails.
pub(super) fn failure(problem: &str) -> Refusal {
    Refusal::new(ErrorCode::Gpu, format!("the daemon cannot put batches on the GPU: {problem}"))
        .with_hint("leave device out, and move batches with images.to(device)")
}
