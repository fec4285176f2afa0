//! The state of one consumer: its slots, its position, what it may get next.
//!
//! A state machine without sockets or clocks: the server feeds it and does what it says.
//!
//! *Invariants* (checked by `check`): each slot is in exactly one state; a slot in `Leased` is
//! written by nobody; deliveries of one start are in step order without gaps.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::gpu::{Finish, GpuSlab};
use crate::pipeline::order::EpochOrder;
use crate::pipeline::plan::{EpochPlan, StepPlan};
use crate::pipeline::render::SlotLayout;
use crate::pipeline::workers::{BatchJob, JobTag};

use super::provider::{EpochPolicy, OpenedStream};
use super::request::{fill_random, n_slots, too_large};
use super::slab::Slab;
use super::slot::{Slot, SlotState};
use super::window::{BatchKey, Place, Window, WindowMemory};
use super::wire::{
    BatchDescriptor, EpochEnd, ErrorCode, GroupMode, Refusal, SlotLease, Start, StreamRequest,
};

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// Name and version of the client.
    pub(super) client: String,
    /// Process, if it is local.
    pub(super) pid: Option<i32>,
    /// User, if it is local.
    pub(super) uid: Option<u32>,
}

/// An epoch under way.
struct EpochRun {
    epoch: u64,
    plan: EpochPlan,
    n_steps: u64,
    order: Arc<EpochOrder>,
    policy: EpochPolicy,
    next_dispatch: u64,
    next_deliver: u64,
    /// Filled out of order: step → slot.
    ready: BTreeMap<u64, u32>,
}

/// What the server must do next for a session.
pub(super) enum Work {
    /// Fill this slot, of the session's slab or of its window, as the job's tag says.
    Fill {
        /// The job.
        job: BatchJob,
        /// Samples in it, at least one.
        n_samples: usize,
    },
    /// Announce this batch.
    Deliver(BatchDescriptor),
    /// Announce the end of the epoch.
    End(EpochEnd),
}

/// What became of a step whose turn it was.
enum Dispatch {
    /// There is none, or no slot for it.
    Nothing,
    /// This is to be computed, for so many samples.
    Job(BatchJob, usize),
    /// Nothing is to be computed: it is empty, or in the window, or will be by another
    /// member's job.
    NoJob,
}

/// One consumer.
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) token: [u8; 16],
    pub(super) peer: Peer,
    pub(super) request: StreamRequest,
    pub(super) stream: OpenedStream,
    pub(super) slab: Arc<Slab>,
    /// Where the slab's bytes go, too.
    pub(super) gpu: Option<GpuSlab>,
    /// Where the parts of its slots lie there, if not as in the slab.
    pub(super) gpu_layout: Option<SlotLayout>,
    /// Why they do not, if they were to.
    pub(super) gpu_refused: String,
    /// What it reads together with the other members of its group.
    pub(super) window: Option<Arc<WindowMemory>>,
    /// Slots of the window that it has done with.
    returned: Vec<u32>,
    slots: Vec<Slot>,
    /// The slot freed last is filled first: its bytes are the likeliest to be in the cache.
    free: Vec<u32>,
    seek: u32,
    run: Option<EpochRun>,
    pub(super) batches_sent: u64,
    pub(super) samples_sent: u64,
    /// Batches that were read from the window.
    pub(super) batches_shared: u64,
    /// The last batch was not in the window, because the group was past it.
    pub(super) is_beyond_window: bool,
    position: (u64, u64, u64),
}

impl Session {
    /// Opens a session for a checked request.
    ///
    /// # Errors
    /// A value out of range, or no memory.
    pub(super) fn open(
        request: StreamRequest,
        stream: OpenedStream,
        peer: Peer,
    ) -> Result<Self, Refusal> {
        let info = stream.spec.split.info();
        let global = u64::from(request.batch_size) * u64::from(request.world_size);
        if request.drop_last && global > info.n_samples {
            return Err(Refusal::new(
                ErrorCode::Invalid,
                format!(
                    "batch_size {} x world_size {} = {global} is more than the {} samples of \
                     '{}/{}', and drop_last leaves no batch at all",
                    request.batch_size,
                    request.world_size,
                    info.n_samples,
                    request.dataset,
                    request.split
                ),
            )
            .with_hint("choose a smaller batch_size, or drop_last=False"));
        }
        let batch_size_max = u64::from(request.batch_size).min(info.n_samples);
        let shape = *stream.spec.recipe.shape();
        let layout = usize::try_from(batch_size_max)
            .ok()
            .and_then(|batch_size| SlotLayout::new(&shape, batch_size))
            .ok_or_else(|| too_large(&request))?;
        let n_slots = n_slots(&request, layout.slot_bytes)?;
        let slab = Slab::new(layout, shape, n_slots).map_err(|error| {
            Refusal::new(
                ErrorCode::Exhausted,
                format!("no memory for {n_slots} slots of {} bytes: {error}", layout.slot_bytes),
            )
            .with_hint("choose a smaller batch_size or fewer slots")
        })?;
        let mut secret = [0u8; 24];
        fill_random(&mut secret)?;
        let (id, token) = secret.split_at(8);
        Ok(Self {
            id: u64::from_le_bytes(id.try_into().expect("8 bytes")),
            token: token.try_into().expect("16 bytes"),
            peer,
            request,
            stream,
            slab: Arc::new(slab),
            gpu: None,
            gpu_layout: None,
            gpu_refused: String::new(),
            window: None,
            returned: Vec::new(),
            slots: vec![Slot::FREE; n_slots as usize],
            free: (0..n_slots).rev().collect(),
            seek: 0,
            run: None,
            batches_sent: 0,
            samples_sent: 0,
            batches_shared: 0,
            is_beyond_window: false,
            position: (0, 0, 0),
        })
    }

    /// The run whose epochs pin a policy together.
    pub(super) fn run_name(&self) -> String {
        if self.request.group.is_empty() {
            format!("connection-{:016x}", self.id)
        } else {
            self.request.group.clone()
        }
    }

    /// Abandons what is under way and begins an epoch at an offset.
    ///
    /// # Errors
    /// The start is out of order or out of range.
    pub(super) fn start(&mut self, start: &Start, policy: EpochPolicy) -> Result<(), Refusal> {
        self.check_start(start)?;
        self.abandon();
        self.seek = start.seek;
        let spec = &self.stream.spec;
        let n_samples = spec.split.info().n_samples;
        let broadcast = self.request.mode == GroupMode::Broadcast;
        let (rank, world_size) =
            if broadcast { (0, 1) } else { (self.request.rank, self.request.world_size) };
        let plan = EpochPlan {
            n_samples,
            batch_size: self.request.batch_size,
            world_size,
            rank,
            drop_last: self.request.drop_last,
            start_offset: start.offset,
        };
        self.position = (start.epoch, 0, start.offset);
        self.run = Some(EpochRun {
            epoch: start.epoch,
            plan,
            n_steps: plan.n_steps(),
            order: Arc::new(EpochOrder::new(n_samples, spec.seed, start.epoch, spec.shuffle)),
            policy,
            next_dispatch: 0,
            next_deliver: 0,
            ready: BTreeMap::new(),
        });
        Ok(())
    }

    /// Checks a start before its policy is looked up.
    ///
    /// # Errors
    /// The start is out of order or out of range.
    pub(super) fn check_start(&self, start: &Start) -> Result<(), Refusal> {
        let n_samples = self.stream.spec.split.info().n_samples;
        if start.seek <= self.seek {
            return Err(Refusal::new(
                ErrorCode::Malformed,
                format!("start number {} after {}", start.seek, self.seek),
            ));
        }
        if start.offset > n_samples {
            return Err(Refusal::new(
                ErrorCode::Invalid,
                format!("offset {} is beyond the epoch's {n_samples} samples", start.offset),
            )
            .with_hint("the state belongs to another dataset"));
        }
        Ok(())
    }

    /// Gives up the epoch under way. What is filled goes back, what is leased stays leased.
    pub(super) fn abandon(&mut self) {
        let Some(run) = self.run.take() else { return };
        for slot in run.ready.into_values() {
            self.free_slot(slot);
        }
    }

    /// The consumer lets go of a slot; a stale or wrong lease is ignored.
    pub(super) fn release(&mut self, lease: SlotLease) -> bool {
        let Some(slot) = self.slots.get(lease.slot as usize) else { return false };
        if slot.state != SlotState::Leased || slot.generation != lease.generation {
            return false;
        }
        match &self.gpu {
            Some(gpu) => {
                self.slots[lease.slot as usize].state = SlotState::Returning;
                gpu.reclaim(lease.slot);
            }
            None => self.free_slot(lease.slot),
        }
        true
    }

    /// The consumer's GPU work on a released slot is over.
    pub(super) fn reclaimed(&mut self, slot: u32) {
        let state = self.slots[slot as usize].state;
        assert_eq!(state, SlotState::Returning, "slot {slot} was released");
        self.free_slot(slot);
    }

    /// Sends a job's result on to the GPU; `false`: it belongs there not.
    pub(super) fn upload(&mut self, tag: JobTag) -> bool {
        let Some(gpu) = &self.gpu else { return false };
        let slot = &mut self.slots[tag.slot as usize];
        slot.uploading = Some(tag);
        let rest = self.stream.finish.clone().zip(slot.rest.take());
        let finish = rest.map(|(finish, (epoch, policy))| -> Finish {
            let samples = self.slab.indices_of(tag.slot, slot.n_filled as usize);
            Box::new(move |place| finish.finish(&policy, epoch, &samples, place))
        });
        gpu.upload(tag.slot, finish);
        true
    }

    /// A slot's bytes are on the GPU, or cannot get there: which job's they are.
    pub(super) fn uploaded(&mut self, slot: u32) -> Option<JobTag> {
        self.slots[slot as usize].uploading.take()
    }

    /// A job is done; `false`: it belongs to a start that was given up, and means nothing any more.
    pub(super) fn finished(&mut self, tag: JobTag) -> bool {
        let slot = &mut self.slots[tag.slot as usize];
        assert_eq!(slot.state, SlotState::Filling, "slot {} was being filled", tag.slot);
        match &mut self.run {
            Some(run) if tag.seek == self.seek => {
                slot.state = SlotState::Ready;
                run.ready.insert(tag.step, tag.slot);
                true
            }
            _ => {
                self.free_slot(tag.slot);
                false
            }
        }
    }

    /// What is to be done next, if anything; to be asked until it says `None`. `window`: that of
    /// the session's group, if it has one.
    pub(super) fn next_work(&mut self, mut window: Option<&mut Window>) -> Option<Work> {
        loop {
            if let Some(delivery) = self.next_delivery() {
                return Some(delivery);
            }
            match self.next_dispatch(window.as_deref_mut()) {
                Dispatch::Nothing => return None,
                Dispatch::Job(job, n_samples) => return Some(Work::Fill { job, n_samples }),
                Dispatch::NoJob => {}
            }
        }
    }

    fn next_delivery(&mut self) -> Option<Work> {
        let run = self.run.as_mut()?;
        if let Some(slot_idx) = run.ready.remove(&run.next_deliver) {
            let step_plan = run.plan.step(run.next_deliver);
            let slot = &mut self.slots[slot_idx as usize];
            slot.state = SlotState::Leased;
            let descriptor = describe(run, step_plan, self.seek, slot_idx, slot);
            self.batches_shared += u64::from(slot.window.is_some());
            run.next_deliver += 1;
            self.batches_sent += 1;
            self.samples_sent += u64::from(step_plan.n_local);
            self.position = (run.epoch, descriptor.step + 1, descriptor.next_offset);
            return Some(Work::Deliver(descriptor));
        }
        if run.next_deliver == run.n_steps {
            let end = EpochEnd { seek: self.seek, epoch: run.epoch, n_steps: run.n_steps };
            self.run = None;
            return Some(Work::End(end));
        }
        None
    }

    fn next_dispatch(&mut self, window: Option<&mut Window>) -> Dispatch {
        let Some(run) = &mut self.run else { return Dispatch::Nothing };
        if run.next_dispatch == run.n_steps {
            return Dispatch::Nothing;
        }
        let Some(slot_idx) = self.free.pop() else { return Dispatch::Nothing };
        let slot = &mut self.slots[slot_idx as usize];
        slot.generation = slot.generation.wrapping_add(1);
        let step = run.next_dispatch;
        run.next_dispatch += 1;
        let step_plan = run.plan.step(step);
        let is_replayed = self.request.replay && step_plan.n_local <= slot.n_filled;
        if step_plan.n_local == 0 || is_replayed {
            slot.state = SlotState::Ready;
            run.ready.insert(step, slot_idx);
            return Dispatch::NoJob;
        }
        slot.state = SlotState::Filling;
        let mut tag = JobTag { session: self.id, seek: self.seek, step, slot: slot_idx };
        let StepPlan { first_position, n_local: n_samples, .. } = step_plan;
        let key =
            BatchKey { epoch: run.epoch, first_position, n_samples, policy_id: run.policy.id };
        if let Some(window) = window {
            let place = window.want(key, tag);
            self.is_beyond_window = place == Place::Own && window.has_company();
            match place {
                Place::Own => {}
                Place::Ready(shared) => {
                    (slot.state, slot.window) = (SlotState::Ready, Some(shared));
                    run.ready.insert(step, slot_idx);
                    return Dispatch::NoJob;
                }
                Place::Soon(shared) => {
                    slot.window = Some(shared);
                    return Dispatch::NoJob;
                }
                Place::Fill(shared) => {
                    slot.window = Some(shared);
                    tag = JobTag { session: window.memory.id, seek: 0, step: 0, slot: shared };
                }
            }
        }
        slot.n_filled = n_samples;
        let mut policy = Arc::clone(&run.policy.prepared);
        if self.stream.finish.is_some() {
            let whole = std::mem::take(&mut policy);
            slot.rest = Some((run.epoch, whole));
        }
        let job = BatchJob {
            spec: Arc::clone(&self.stream.spec),
            order: Arc::clone(&run.order),
            epoch: run.epoch,
            first_position,
            policy,
            tag,
        };
        Dispatch::Job(job, n_samples as usize)
    }

    /// Epoch, step and offset of the next batch to be delivered.
    pub(super) fn position(&self) -> (u64, u64, u64) {
        self.position
    }

    /// Reference and version of the epoch's policy, if one is under way.
    pub(super) fn policy(&self) -> Option<(&str, u64)> {
        self.run.as_ref().map(|run| (run.policy.reference.as_str(), run.policy.version))
    }

    /// Slots that are leased, and free; the others are being filled or wait to be announced.
    pub(super) fn slot_counts(&self) -> (u32, u32) {
        let count = |state| self.slots.iter().filter(|slot| slot.state == state).count();
        let small = |n: usize| u32::try_from(n).expect("at most SLOTS_MAX");
        (small(count(SlotState::Leased)), small(count(SlotState::Free)))
    }

    /// Slots in the slab.
    pub(super) fn n_slots(&self) -> u32 {
        u32::try_from(self.slots.len()).expect("at most SLOTS_MAX")
    }

    /// Slots of the window that the session has done with since the last call.
    pub(super) fn take_returned(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.returned)
    }

    /// Slots of the window that the session still holds or waits for: for when it ends.
    pub(super) fn held_in_window(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots.iter().filter_map(|slot| slot.window)
    }

    fn free_slot(&mut self, slot: u32) {
        let state = &mut self.slots[slot as usize];
        state.state = SlotState::Free;
        self.returned.extend(state.window.take());
        self.free.push(slot);
        debug_assert!(self.free.len() <= self.slots.len(), "a slot is free once");
    }
}

fn describe(
    run: &EpochRun,
    plan: StepPlan,
    seek: u32,
    slot_idx: u32,
    slot: &Slot,
) -> BatchDescriptor {
    BatchDescriptor {
        seek,
        slot: slot_idx,
        generation: slot.generation,
        n_samples: plan.n_local,
        epoch: run.epoch,
        step: run.next_deliver,
        next_offset: plan.next_offset,
        policy_id: run.policy.id,
        policy_version: run.policy.version,
        n_global: plan.n_global,
        inline: false,
        last: plan.last,
        window_slot: slot.window.map_or(0, |slot| slot + 1),
    }
}
