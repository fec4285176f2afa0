//! A window and the real sessions of its members against an obvious model: random events, checked
//! after each.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proptest::prelude::*;

use super::super::session::{Session, Work};
use super::super::session_tests::{policy, session};
use super::super::slab::Slab;
use super::super::wire::{BatchDescriptor, SlotLease, Start};
use super::*;

const N_SAMPLES: u64 = 60;
const BATCH_SIZE: u32 = 4;

/// Epoch, first position and samples of a batch.
type Content = (u64, u64, u32);

struct Member {
    session: Session,
    epoch: u64,
    seek: u32,
    /// Samples that the epoch began with, and steps since.
    offset: u64,
    n_steps_taken: u64,
    leased: BTreeMap<u32, BatchDescriptor>,
    has_ended: bool,
}

struct World {
    window: Window,
    members: Vec<Member>,
    jobs: Vec<(JobTag, Content)>,
    /// What lies in the window's slots.
    content: HashMap<u32, Content>,
    n_jobs: u64,
}

impl World {
    fn new(n_members: usize, n_slots: u32) -> Self {
        let first = session(N_SAMPLES, BATCH_SIZE, 0, 1, n_slots);
        let layout = *first.slab.layout();
        let shape = *first.stream.spec.recipe.shape();
        let slab = Arc::new(Slab::for_readers(layout, shape, 64).expect("has memory"));
        let memory = Arc::new(WindowMemory { id: 1, slab, n_apart: n_slots });
        let mut window = Window::new(Arc::clone(&memory));
        let members = (0..n_members).map(|_| {
            let mut session = session(N_SAMPLES, BATCH_SIZE, 0, 1, n_slots);
            session.window = Some(Arc::clone(&memory));
            window.join(n_slots);
            Member {
                session,
                epoch: 0,
                seek: 0,
                offset: 0,
                n_steps_taken: 0,
                leased: BTreeMap::new(),
                has_ended: true,
            }
        });
        let members = members.collect();
        Self { window, members, jobs: Vec::new(), content: HashMap::new(), n_jobs: 0 }
    }

    fn start(&mut self, idx: usize, epoch: u64, offset: u64) {
        let member = &mut self.members[idx];
        member.seek += 1;
        let start = Start { seek: member.seek, epoch, offset, policy: String::new() };
        member.session.start(&start, policy()).expect("starts");
        (member.epoch, member.offset) = (epoch, offset);
        (member.n_steps_taken, member.has_ended) = (0, false);
        self.advance(idx);
    }

    /// Does all the work that a member has, and checks it.
    fn advance(&mut self, idx: usize) {
        self.settle(idx);
        while let Some(work) = self.members[idx].session.next_work(Some(&mut self.window)) {
            match work {
                Work::Fill { job, n_samples } => {
                    let n_samples = u32::try_from(n_samples).expect("few");
                    let content = (job.epoch, job.first_position, n_samples);
                    if job.tag.session == self.window.memory.id {
                        let slot = job.tag.slot + 1;
                        let mut leases = self.members.iter().flat_map(|m| m.leased.values());
                        assert!(
                            leases.all(|lease| lease.window_slot != slot),
                            "a slot that is read is written"
                        );
                        assert!(self.jobs.iter().all(|(tag, _)| *tag != job.tag), "filled twice");
                        self.content.remove(&job.tag.slot);
                    }
                    self.jobs.push((job.tag, content));
                    self.n_jobs += 1;
                }
                Work::Deliver(batch) => self.delivered(idx, batch),
                Work::End(_) => self.members[idx].has_ended = true,
            }
        }
    }

    fn delivered(&mut self, idx: usize, batch: BatchDescriptor) {
        let member = &mut self.members[idx];
        let first = member.offset + member.n_steps_taken * u64::from(BATCH_SIZE);
        let expected = (member.epoch, first, batch.n_samples);
        assert_eq!(batch.step, member.n_steps_taken);
        assert_eq!(batch.next_offset, first + u64::from(batch.n_samples));
        if batch.window_slot > 0 {
            assert_eq!(self.content.get(&(batch.window_slot - 1)), Some(&expected));
        }
        member.n_steps_taken += 1;
        assert!(member.leased.insert(batch.slot, batch).is_none(), "a leased slot is announced");
    }

    fn settle(&mut self, idx: usize) {
        let returned = self.members[idx].session.take_returned();
        for slot in returned {
            self.window.release(slot);
        }
    }

    fn finish(&mut self, nth: usize, is_good: bool) {
        let (tag, content) = self.jobs.swap_remove(nth);
        let tags = if tag.session == self.window.memory.id {
            if is_good {
                self.content.insert(tag.slot, content);
            }
            self.window.filled(tag.slot, is_good)
        } else {
            vec![tag]
        };
        for tag in tags {
            let found = self.members.iter().position(|m| m.session.id == tag.session);
            let idx = found.expect("nobody waits who has left");
            if self.members[idx].session.finished(tag) && !is_good {
                self.members[idx].session.abandon();
                self.members[idx].has_ended = true;
            }
            self.advance(idx);
        }
    }

    fn release(&mut self, idx: usize, nth: usize) {
        let member = &mut self.members[idx];
        let Some((&slot, &batch)) = member.leased.iter().nth(nth) else { return };
        member.leased.remove(&slot);
        let lease = SlotLease { slot, generation: batch.generation };
        assert!(member.session.release(lease));
        self.advance(idx);
    }

    fn leave(&mut self, idx: usize) {
        self.settle(idx);
        let member = self.members.swap_remove(idx);
        member.session.held_in_window().for_each(|slot| self.window.release(slot));
        self.window.leave(member.session.id, member.session.n_slots());
        // Its own jobs end without it.
        self.jobs.retain(|(tag, _)| tag.session != member.session.id);
    }

    /// One member reads to its epoch's end while all others stand still.
    fn read_on(&mut self, idx: usize) {
        for _ in 0..1000 {
            if self.members[idx].has_ended && self.jobs.is_empty() {
                return;
            }
            while !self.jobs.is_empty() {
                self.finish(0, true);
            }
            while !self.members[idx].leased.is_empty() {
                self.release(idx, 0);
            }
        }
        panic!("a member waits for others");
    }
}

/// Members in step share every batch.
#[test]
fn what_all_members_read_at_the_same_pace_is_made_once() {
    let mut world = World::new(4, 4);
    (0..4).for_each(|idx| world.start(idx, 0, 0));
    while world.members.iter().any(|member| !member.has_ended) {
        while !world.jobs.is_empty() {
            world.finish(0, true);
        }
        (0..4).for_each(|idx| world.release(idx, 0));
    }
    assert_eq!(world.n_jobs, N_SAMPLES / u64::from(BATCH_SIZE));
    assert!(world.members.iter().all(|member| !member.session.is_beyond_window));
}

#[test]
fn a_member_that_stands_still_holds_up_nobody_and_comes_back_by_itself() {
    let mut world = World::new(2, 3);
    world.start(0, 0, 0);
    world.start(1, 0, 0);
    world.read_on(0);
    for epoch in 1..4 {
        world.start(0, epoch, 0);
        world.read_on(0);
    }
    // It goes on where it stood, alone, and meets the other at the same place later.
    let content = world.content.clone();
    let ahead = |content: &HashMap<u32, Content>| {
        content.values().filter(|(epoch, ..)| *epoch == 3).copied().collect::<Vec<_>>()
    };
    world.read_on(1);
    assert_eq!(ahead(&content).len(), ahead(&world.content).len(), "it took what others may want");
    let before = world.n_jobs;
    world.start(1, 4, 0);
    world.start(0, 4, 0);
    while world.members.iter().any(|member| !member.has_ended) {
        while !world.jobs.is_empty() {
            world.finish(0, true);
        }
        (0..2).for_each(|idx| world.release(idx, 0));
    }
    assert_eq!(world.n_jobs - before, N_SAMPLES / u64::from(BATCH_SIZE));
    assert!(!world.members[1].session.is_beyond_window);
}

/// Members that stand still with all that they can hold leave the others a window of their own.
#[test]
fn paused_members_do_not_end_the_sharing_of_others() {
    let mut world = World::new(5, 4);
    for idx in 2..5 {
        // Each holds its first four batches, of another epoch.
        world.start(idx, 10 + idx as u64, 0);
        while !world.jobs.is_empty() {
            world.finish(0, true);
        }
    }
    let before = world.n_jobs;
    (0..2).for_each(|idx| world.start(idx, 0, 0));
    while !(world.members[0].has_ended && world.members[1].has_ended) {
        while !world.jobs.is_empty() {
            world.finish(0, true);
        }
        (0..2).for_each(|idx| world.release(idx, 0));
    }
    assert_eq!(world.n_jobs - before, N_SAMPLES / u64::from(BATCH_SIZE));
}

/// All members begin the run again: what lies in the window is of epochs that nobody comes to.
#[test]
fn a_group_that_begins_anew_shares_again() {
    let mut world = World::new(2, 3);
    world.start(0, 9, 0);
    world.read_on(0);
    let mut n_jobs = 0;
    for epoch in 0..6 {
        let before = world.n_jobs;
        (0..2).for_each(|idx| world.start(idx, epoch, 0));
        while world.members.iter().any(|member| !member.has_ended) {
            while !world.jobs.is_empty() {
                world.finish(0, true);
            }
            (0..2).for_each(|idx| world.release(idx, 0));
        }
        n_jobs = world.n_jobs - before;
    }
    assert_eq!(n_jobs, N_SAMPLES / u64::from(BATCH_SIZE), "the last epoch is shared");
}

proptest! {
    #[test]
    fn random_events_break_no_promise(
        n_members in 1usize..5,
        n_slots in 2u32..5,
        events in proptest::collection::vec((0u8..20, any::<u32>()), 1..400),
    ) {
        let mut world = World::new(n_members, n_slots);
        for (kind, pick) in events {
            let pick = pick as usize;
            if world.members.is_empty() {
                break;
            }
            let idx = pick % world.members.len();
            match kind {
                0..=8 if !world.jobs.is_empty() => {
                    world.finish(pick % world.jobs.len(), !pick.is_multiple_of(23));
                }
                9..=15 => {
                    let n_leased = world.members[idx].leased.len();
                    world.release(idx, pick.checked_rem(n_leased).unwrap_or(0));
                }
                16..=18 if world.members[idx].has_ended || pick.is_multiple_of(5) => {
                    let epoch = pick as u64 / 7 % 3;
                    // Some begin where no other does.
                    let offset = if pick.is_multiple_of(3) { pick as u64 % N_SAMPLES } else { 0 };
                    world.start(idx, epoch, offset);
                }
                19 if pick.is_multiple_of(11) => world.leave(idx),
                _ => {}
            }
        }
        for idx in 0..world.members.len() {
            world.read_on(idx);
        }
        while let Some(idx) = world.members.len().checked_sub(1) {
            while !world.members[idx].leased.is_empty() {
                world.release(idx, 0);
            }
            world.leave(idx);
        }
        while !world.jobs.is_empty() {
            world.finish(0, true);
        }
        prop_assert_eq!(world.window.n_read(), 0, "a slot is never given back");
        prop_assert!(world.window.is_over());
    }
}
