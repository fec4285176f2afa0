//! The state of one consumer: its slots, its position, what it may get next.
//!
//! A state machine without sockets or clocks: the server feeds it and does what it says.
//!
//! *Invariants* (checked by `check`): each slot is in exactly one state; a slot in `Leased` is
//! written by nobody; deliveries of one start are in step order without gaps.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::limits::{
    BATCH_SIZE_MAX, NAME_BYTES_MAX, SLAB_BYTES_MAX, SLOTS_MAX, SLOTS_MIN, WORLD_SIZE_MAX,
};
use crate::pipeline::order::EpochOrder;
use crate::pipeline::plan::{EpochPlan, StepPlan};
use crate::pipeline::recipe::{Dtype, Layout};
use crate::pipeline::render::SlotLayout;
use crate::pipeline::workers::{BatchJob, JobTag};

use super::provider::{EpochPolicy, OpenedStream};
use super::slab::Slab;
use super::wire::{
    BatchDescriptor, EpochEnd, ErrorCode, GroupMode, Refusal, SlotLease, Start, StreamRequest,
    Welcome, WireDtype, WireLabels, WireLayout,
};
use crate::dataset::LabelKind;

/// A slab is made about this large if the client does not say how many slots it wants.
const SLAB_BYTES_TARGET: usize = 64 * 1024 * 1024;
/// Slots when a batch is large.
const SLOTS_DEFAULT_MIN: usize = 3;
/// Slots when a batch is small.
const SLOTS_DEFAULT_MAX: usize = 8;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    Free,
    /// A job writes to it.
    Filling,
    /// Filled, not announced yet.
    Ready,
    /// The consumer reads it.
    Leased,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: SlotState,
    /// Counts the slot's lives; rises when it is filled anew.
    generation: u32,
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
    /// Fill this slot.
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

/// One consumer.
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) token: [u8; 16],
    pub(super) peer: Peer,
    pub(super) request: StreamRequest,
    pub(super) stream: OpenedStream,
    pub(super) slab: Arc<Slab>,
    slots: Vec<Slot>,
    /// The slot freed last is filled first: its bytes are the likeliest to be in the cache.
    free: Vec<u32>,
    seek: u32,
    run: Option<EpochRun>,
    pub(super) batches_sent: u64,
    pub(super) samples_sent: u64,
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
            slots: vec![Slot { state: SlotState::Free, generation: 0 }; n_slots as usize],
            free: (0..n_slots).rev().collect(),
            seek: 0,
            run: None,
            batches_sent: 0,
            samples_sent: 0,
            position: (0, 0, 0),
        })
    }

    /// What the client is told when it is let in.
    pub(super) fn welcome(&self, endpoint: &str) -> Welcome {
        let shape = *self.stream.spec.recipe.shape();
        let info = self.stream.spec.split.info();
        let layout = self.slab.layout();
        let small = |value: usize| u32::try_from(value).expect("sides are at most IMAGE_SIDE_MAX");
        Welcome {
            session: self.id,
            token: self.token,
            endpoint: endpoint.to_owned(),
            slot_bytes: layout.slot_bytes as u64,
            n_slots: self.n_slots(),
            labels_offset: layout.labels_offset as u64,
            indices_offset: layout.indices_offset as u64,
            batch_size: self.request.batch_size,
            height: small(shape.height),
            width: small(shape.width),
            channels: small(shape.channels),
            dtype: match shape.dtype {
                Dtype::U8 => WireDtype::U8,
                Dtype::F16 => WireDtype::F16,
                Dtype::Bf16 => WireDtype::Bf16,
                Dtype::F32 => WireDtype::F32,
            },
            layout: match shape.layout {
                Layout::Nchw => WireLayout::Nchw,
                Layout::Nhwc => WireLayout::Nhwc,
            },
            labels: match shape.labels {
                LabelKind::Class { n_classes } => WireLabels::Class { n_classes },
                LabelKind::Vector { len } => WireLabels::Vector { len },
            },
            n_samples: info.n_samples,
            fingerprint: info.fingerprint.0.clone(),
            recipe_json: self.stream.recipe_json.clone(),
            daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
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
        self.free_slot(lease.slot);
        true
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

    /// What is to be done next, if anything; to be asked until it says `None`.
    pub(super) fn next_work(&mut self) -> Option<Work> {
        let run = self.run.as_mut()?;
        if let Some(slot_idx) = run.ready.remove(&run.next_deliver) {
            let step_plan = run.plan.step(run.next_deliver);
            let slot = &mut self.slots[slot_idx as usize];
            slot.state = SlotState::Leased;
            let descriptor = describe(run, step_plan, self.seek, slot_idx, slot.generation);
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
        if run.next_dispatch == run.n_steps {
            return None;
        }
        let slot_idx = self.free.pop()?;
        let slot = &mut self.slots[slot_idx as usize];
        slot.generation = slot.generation.wrapping_add(1);
        let step = run.next_dispatch;
        run.next_dispatch += 1;
        let step_plan = run.plan.step(step);
        if step_plan.n_local == 0 {
            slot.state = SlotState::Ready;
            run.ready.insert(step, slot_idx);
            return self.next_work();
        }
        slot.state = SlotState::Filling;
        let tag = JobTag { session: self.id, seek: self.seek, step, slot: slot_idx };
        let job = BatchJob {
            spec: Arc::clone(&self.stream.spec),
            order: Arc::clone(&run.order),
            epoch: run.epoch,
            first_position: step_plan.first_position,
            policy: Arc::clone(&run.policy.prepared),
            tag,
        };
        Some(Work::Fill { job, n_samples: step_plan.n_local as usize })
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

    fn free_slot(&mut self, slot: u32) {
        self.slots[slot as usize].state = SlotState::Free;
        self.free.push(slot);
        debug_assert!(self.free.len() <= self.slots.len(), "a slot is free once");
    }
}

fn describe(
    run: &EpochRun,
    plan: StepPlan,
    seek: u32,
    slot: u32,
    generation: u32,
) -> BatchDescriptor {
    BatchDescriptor {
        seek,
        slot,
        generation,
        n_samples: plan.n_local,
        epoch: run.epoch,
        step: run.next_deliver,
        next_offset: plan.next_offset,
        policy_id: run.policy.id,
        policy_version: run.policy.version,
        n_global: plan.n_global,
        inline: false,
        last: plan.last,
    }
}

/// Checks what can be checked of a request without its dataset.
///
/// # Errors
/// The first value that is out of range.
pub(super) fn check_request(request: &StreamRequest) -> Result<(), Refusal> {
    let invalid = |message: String, hint: &str| {
        Err(Refusal::new(ErrorCode::Invalid, message).with_hint(hint))
    };
    let StreamRequest { batch_size, world_size, rank, n_slots, .. } = *request;
    if batch_size == 0 || batch_size > BATCH_SIZE_MAX {
        return invalid(
            format!("batch_size {batch_size} is not between 1 and {BATCH_SIZE_MAX}"),
            "choose how many samples this rank takes per step",
        );
    }
    if world_size == 0 || world_size > WORLD_SIZE_MAX {
        return invalid(
            format!("world_size {world_size} is not between 1 and {WORLD_SIZE_MAX}"),
            "world_size is the number of ranks that share the epoch",
        );
    }
    if rank >= world_size {
        return invalid(
            format!("rank {rank} is not below world_size {world_size}"),
            "ranks count from 0",
        );
    }
    if n_slots != 0 && !(SLOTS_MIN..=SLOTS_MAX).contains(&n_slots) {
        return invalid(
            format!("n_slots {n_slots} is not between {SLOTS_MIN} and {SLOTS_MAX}"),
            "0 lets the daemon choose",
        );
    }
    for (what, name) in
        [("dataset", &request.dataset), ("split", &request.split), ("group", &request.group)]
    {
        if name.len() > NAME_BYTES_MAX {
            return invalid(
                format!("the {what}'s name is {} bytes long", name.len()),
                &format!("at most {NAME_BYTES_MAX} bytes"),
            );
        }
    }
    Ok(())
}

fn n_slots(request: &StreamRequest, slot_bytes: usize) -> Result<u32, Refusal> {
    let n_slots = match request.n_slots {
        0 => {
            let fitting = SLAB_BYTES_TARGET / slot_bytes.max(1);
            let clamped = fitting.clamp(SLOTS_DEFAULT_MIN, SLOTS_DEFAULT_MAX);
            u32::try_from(clamped).expect("at most SLOTS_DEFAULT_MAX")
        }
        n_slots => n_slots,
    };
    if slot_bytes as u64 * u64::from(n_slots) > SLAB_BYTES_MAX {
        return Err(too_large(request));
    }
    Ok(n_slots)
}

fn too_large(request: &StreamRequest) -> Refusal {
    Refusal::new(
        ErrorCode::Invalid,
        format!(
            "batches of {} samples need more than {SLAB_BYTES_MAX} bytes of shared memory",
            request.batch_size
        ),
    )
    .with_hint("choose a smaller batch_size or n_slots")
}

fn fill_random(bytes: &mut [u8]) -> Result<(), Refusal> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
                .map_err(|error| {
                    Refusal::new(ErrorCode::Internal, format!("no random numbers: {error}"))
                })?;
    }
    Ok(())
}
