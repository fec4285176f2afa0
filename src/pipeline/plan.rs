//! Which positions of an epoch go to which rank in which step.
//!
//! An epoch of `n` samples is cut into global batches of `batch_size * world_size`. Rank `r` takes
//! the `r`-th part of each. The last, incomplete global batch is split so that shares differ by at
//! most one and all ranks make equally many steps; a share is empty only when fewer samples remain
//! than there are ranks. The state of an epoch is one number, the count of samples that all ranks
//! together were given, so any rank's state serves all ranks, and any other world size or batch
//! size can go on from it.

/// How an epoch (or what is left of it) is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochPlan {
    /// Samples in the split.
    pub n_samples: u64,
    /// Samples per rank and step, at least 1.
    pub batch_size: u32,
    /// Number of ranks, at least 1.
    pub world_size: u32,
    /// This rank, below `world_size`.
    pub rank: u32,
    /// Whether the last, incomplete global batch is dropped.
    pub drop_last: bool,
    /// Samples already given before this plan starts, at most `n_samples`.
    pub start_offset: u64,
}

/// One rank's part of one global batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// First position in the epoch's order.
    pub first_position: u64,
    /// Samples of this rank.
    pub n_local: u32,
    /// Samples of all ranks.
    pub n_global: u64,
    /// Samples given once all ranks have had this step.
    pub next_offset: u64,
    /// No step follows.
    pub last: bool,
}

impl EpochPlan {
    /// Samples of a full global batch.
    fn global_batch(&self) -> u64 {
        u64::from(self.batch_size) * u64::from(self.world_size)
    }

    /// Steps that every rank makes.
    pub fn n_steps(&self) -> u64 {
        let remaining = self.n_samples - self.start_offset;
        if self.drop_last {
            remaining / self.global_batch()
        } else {
            remaining.div_ceil(self.global_batch())
        }
    }

    /// The part of this rank in step `step` of this plan.
    ///
    /// # Panics
    /// If `step` is not below [`Self::n_steps`].
    pub fn step(&self, step: u64) -> StepPlan {
        let n_steps = self.n_steps();
        assert!(step < n_steps, "step {step} of {n_steps}");
        let global = self.global_batch();
        let begin = self.start_offset + step * global;
        let n_global = global.min(self.n_samples - begin);
        let (rank, world) = (u64::from(self.rank), u64::from(self.world_size));
        // A full global batch divides evenly: both cases are the same formula.
        let (share, extra) = (n_global / world, n_global % world);
        let n_local = share + u64::from(rank < extra);
        StepPlan {
            first_position: begin + rank * share + rank.min(extra),
            n_local: u32::try_from(n_local).expect("a share is at most batch_size, a u32"),
            n_global,
            next_offset: begin + n_global,
            last: step + 1 == n_steps,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn positions(plan: EpochPlan) -> Vec<Vec<u64>> {
        (0..plan.n_steps())
            .map(|step| {
                let step = plan.step(step);
                (step.first_position..step.first_position + u64::from(step.n_local)).collect()
            })
            .collect()
    }

    proptest! {
        #[test]
        fn all_ranks_together_visit_each_position_once(
            n_samples in 1u64..400,
            batch_size in 1u32..50,
            world_size in 1u32..9,
            offset_part in 0u64..100,
            drop_last: bool,
        ) {
            let start_offset = n_samples * offset_part / 100;
            let plan = |rank| EpochPlan {
                n_samples, batch_size, world_size, rank, drop_last, start_offset,
            };
            let ranks: Vec<_> = (0..world_size).map(|rank| positions(plan(rank))).collect();
            let n_steps = plan(0).n_steps();
            let mut visited = Vec::new();
            for step in 0..usize::try_from(n_steps).unwrap() {
                let sizes: Vec<_> = ranks.iter().map(|rank| rank[step].len()).collect();
                let (min, max) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
                prop_assert!(max - min <= 1);
                prop_assert!(*max <= batch_size as usize);
                let in_step: Vec<_> = ranks.iter().flat_map(|rank| rank[step].clone()).collect();
                let step_plan = plan(0).step(step as u64);
                prop_assert_eq!(in_step.len() as u64, step_plan.n_global);
                visited.extend(in_step);
                prop_assert_eq!(visited.len() as u64 + start_offset, step_plan.next_offset);
                prop_assert_eq!(step_plan.last, step as u64 + 1 == n_steps);
            }
            let global = u64::from(batch_size * world_size);
            let expected_end = if drop_last {
                start_offset + (n_samples - start_offset) / global * global
            } else {
                n_samples
            };
            prop_assert!(visited.into_iter().eq(start_offset..expected_end));
        }
    }

    #[test]
    fn fewer_samples_than_ranks_leave_empty_shares_but_equal_steps() {
        let plan = |rank| EpochPlan {
            n_samples: 10,
            batch_size: 2,
            world_size: 4,
            rank,
            drop_last: false,
            start_offset: 0,
        };
        let last: Vec<_> = (0..4).map(|rank| plan(rank).step(1).n_local).collect();
        assert_eq!(last, [1, 1, 0, 0]);
        assert!((0..4).all(|rank| plan(rank).n_steps() == 2));
    }
}
