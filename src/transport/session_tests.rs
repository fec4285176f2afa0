//! The session against a slow, obvious model: random events, checked after each.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proptest::prelude::*;

use super::provider::{EpochPolicy, OpenedStream};
use super::session::{Peer, Session, Work};
use super::wire::{GroupMode, SlotLease, Start, StreamRequest};
use crate::augment::PreparedPolicy;
use crate::dataset::{
    Content, DatasetError, Fingerprint, ImageKind, Label, LabelKind, Pixels, RawImage, Sample,
    Split, SplitInfo,
};
use crate::image::decode::DecodeLimits;
use crate::pipeline::recipe::{OnError, Recipe};
use crate::pipeline::render::CompiledRecipe;
use crate::pipeline::workers::{JobTag, StreamSpec};

/// One-pixel samples: the session never looks at them.
#[derive(Debug)]
struct Dots(SplitInfo);

impl Split for Dots {
    fn info(&self) -> &SplitInfo {
        &self.0
    }

    fn sample<'a>(
        &'a self,
        sample_idx: u64,
        _buffer: &'a mut Vec<u8>,
    ) -> Result<Sample<'a>, DatasetError> {
        let image = RawImage { width: 1, height: 1, channels: 1, pixels: Pixels::Hwc(&[7]) };
        Ok(Sample { content: Content::Raw(image), label: self.label(sample_idx)? })
    }

    fn label(&self, _sample_idx: u64) -> Result<Label<'_>, DatasetError> {
        Ok(Label::Class(0))
    }
}

/// A session without a group.
pub(super) fn session(
    n_samples: u64,
    batch_size: u32,
    rank: u32,
    world_size: u32,
    n_slots: u32,
) -> Session {
    let info = SplitInfo {
        format: "dots",
        n_samples,
        images: ImageKind::Raw { width: 1, height: 1, channels: 1 },
        label_kind: LabelKind::Class { n_classes: 1 },
        class_names: vec![],
        fingerprint: Fingerprint("0".to_owned()),
        mapped_bytes: 0,
    };
    let recipe = CompiledRecipe::new(&Recipe::default(), &info, DecodeLimits::default());
    let recipe = recipe.expect("fits");
    let split = Arc::new(Dots(info));
    let spec = Arc::new(StreamSpec {
        split,
        recipe,
        seed: 0,
        shuffle: true,
        shared: None,
        on_error: OnError::Fail,
        bad_samples: None,
    });
    let stream = OpenedStream {
        spec,
        policy_reference: "none".to_owned(),
        total_epochs: 0,
        recipe_json: "{}".to_owned(),
        finish: None,
        must_pay: false,
    };
    let request = StreamRequest {
        dataset: "dots".to_owned(),
        split: "train".to_owned(),
        batch_size,
        seed: 0,
        rank,
        world_size,
        drop_last: false,
        shuffle: true,
        group: String::new(),
        mode: GroupMode::Shard,
        recipe_json: "{}".to_owned(),
        n_slots,
        replay: false,
        gpu: None,
    };
    let peer = Peer { client: "test".to_owned(), pid: None, uid: None };
    Session::open(request, stream, peer).expect("opens")
}

pub(super) fn policy() -> EpochPolicy {
    let prepared = Arc::new(PreparedPolicy::default());
    EpochPolicy { prepared, reference: "none".to_owned(), id: [0; 16], version: 0 }
}

/// What the test knows of the session's world.
#[derive(Default)]
struct World {
    seek: u32,
    next_step: u64,
    n_steps: u64,
    ended: bool,
    /// Jobs under way.
    filling: Vec<JobTag>,
    /// What the consumer holds: slot → generation.
    leased: BTreeMap<u32, u32>,
    generations: HashMap<u32, u32>,
}

impl World {
    /// Does all the work that the session has, and checks it.
    fn advance(&mut self, session: &mut Session) {
        while let Some(work) = session.next_work(None) {
            match work {
                Work::Fill { job, n_samples } => {
                    let slot = job.tag.slot;
                    assert!(n_samples > 0);
                    assert!(self.filling.iter().all(|tag| tag.slot != slot), "filled twice");
                    assert!(!self.leased.contains_key(&slot), "a leased slot is filled");
                    assert_eq!(job.tag.seek, self.seek);
                    self.filling.push(job.tag);
                }
                Work::Deliver(batch) => {
                    assert!(!self.ended, "a batch after the end");
                    assert_eq!((batch.seek, batch.step), (self.seek, self.next_step));
                    assert_eq!(batch.last, batch.step + 1 == self.n_steps);
                    assert!(self.filling.iter().all(|tag| tag.slot != batch.slot));
                    let before = self.generations.insert(batch.slot, batch.generation);
                    assert_ne!(before, Some(batch.generation), "a life is told twice");
                    let held = self.leased.insert(batch.slot, batch.generation);
                    assert_eq!(held, None, "a leased slot is announced");
                    self.next_step += 1;
                }
                Work::End(end) => {
                    assert_eq!((end.seek, end.n_steps), (self.seek, self.n_steps));
                    assert_eq!(self.next_step, self.n_steps, "the end comes last");
                    self.ended = true;
                }
            }
        }
        let (n_leased, n_free) = session.slot_counts();
        assert_eq!(n_leased as usize, self.leased.len());
        assert!(
            n_free as usize + self.leased.len() + self.filling.len() <= {
                session.n_slots() as usize
            }
        );
    }
}

proptest! {
    #[test]
    fn random_events_break_no_promise(
        n_samples in 1u64..60,
        batch_size in 1u32..20,
        world_size in 1u32..5,
        n_slots in 2u32..6,
        events in proptest::collection::vec((0u8..10, any::<u32>()), 1..200),
    ) {
        let rank = world_size - 1;
        let mut session = session(n_samples, batch_size, rank, world_size, n_slots);
        let mut world = World { ended: true, ..World::default() };
        for (kind, pick) in events {
            match kind {
                // A job ends, in any order.
                0..=3 if !world.filling.is_empty() => {
                    let tag = world.filling.swap_remove(pick as usize % world.filling.len());
                    let is_current = tag.seek == world.seek && !world.ended;
                    prop_assert_eq!(session.finished(tag), is_current);
                }
                // The consumer lets go of a batch, in any order.
                4..=6 if !world.leased.is_empty() => {
                    let nth = pick as usize % world.leased.len();
                    let (&slot, &generation) = world.leased.iter().nth(nth).expect("is there");
                    world.leased.remove(&slot);
                    let lease = SlotLease { slot, generation };
                    prop_assert!(session.release(lease));
                    prop_assert!(!session.release(lease), "twice");
                }
                // A release that was never due.
                7 => {
                    let lease = SlotLease { slot: pick % 8, generation: pick };
                    if world.leased.get(&lease.slot) != Some(&lease.generation) {
                        prop_assert!(!session.release(lease));
                    }
                }
                // The consumer starts anew, in the middle or after the end.
                8 if world.ended || pick % 4 == 0 => {
                    let offset = u64::from(pick) % (n_samples + 1);
                    let seek = world.seek + 1;
                    let start = Start { seek, epoch: 1, offset, policy: String::new() };
                    session.start(&start, policy()).expect("starts");
                    let global = u64::from(batch_size) * u64::from(world_size);
                    world.seek = seek;
                    world.next_step = 0;
                    world.n_steps = (n_samples - offset).div_ceil(global);
                    world.ended = false;
                    // A start that is not newer is refused and changes nothing.
                    prop_assert!(session.start(&start, policy()).is_err());
                }
                _ => {}
            }
            world.advance(&mut session);
        }
        // Left alone with a consumer that reads on, the epoch comes to its end.
        for _ in 0..10_000 {
            if world.ended {
                break;
            }
            while let Some(tag) = world.filling.pop() {
                session.finished(tag);
            }
            for (slot, generation) in std::mem::take(&mut world.leased) {
                let lease = SlotLease { slot, generation };
                prop_assert!(session.release(lease));
            }
            world.advance(&mut session);
        }
        prop_assert!(world.ended, "the epoch never ends");
    }
}
