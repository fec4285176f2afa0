//! The epoch's order: a keyed permutation of `0..n`, computed per position.
//!
//! *Source*: a balanced Feistel network over the smallest even-width power of two that holds `n`,
//! restricted to `0..n` by cycle walking (J. Black, P. Rogaway, "Ciphers with arbitrary finite
//! domains", CT-RSA 2002). The domain is less than 4 n, so a position takes fewer than four walks
//! on average. The round function is the 32-bit finaliser `lowbias32` (C. Wellons, "Prospecting
//! for hash functions", 2018) of the half and a round key; round keys come from Philox under
//! (seed, epoch).

use crate::random::{Purpose, SampleRng};

const N_ROUNDS: usize = 8;

/// The order of one epoch of one stream: O(1) memory, any position at once.
#[derive(Clone, Debug)]
pub struct EpochOrder {
    n_samples: u64,
    /// `None`: index order.
    network: Option<Feistel>,
}

#[derive(Clone, Debug)]
struct Feistel {
    round_keys: [u32; N_ROUNDS],
    half_bits: u32,
    half_mask: u64,
}

impl EpochOrder {
    /// The order of `epoch` under `seed`, or index order if `shuffle` is false.
    pub fn new(n_samples: u64, seed: u64, epoch: u64, shuffle: bool) -> Self {
        // Fewer than two samples have one order only.
        let network = (shuffle && n_samples > 1).then(|| Feistel::new(n_samples, seed, epoch));
        Self { n_samples, network }
    }

    /// The sample visited at `position`.
    ///
    /// # Panics
    /// If `position` is not below the number of samples.
    #[inline]
    pub fn sample_at(&self, position: u64) -> u64 {
        assert!(position < self.n_samples, "position {position} of {}", self.n_samples);
        let Some(network) = &self.network else { return position };
        let mut value = network.permute(position);
        // Terminates: the network permutes its domain, so the walk from a member of 0..n comes
        // back to 0..n at the latest at its own start.
        while value >= self.n_samples {
            value = network.permute(value);
        }
        value
    }
}

impl Feistel {
    fn new(n_samples: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - (n_samples - 1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        // Shared by all samples of the epoch, hence a sample index that no sample has.
        let mut rng = SampleRng::new(seed, epoch, u64::MAX, Purpose::Order);
        let round_keys = std::array::from_fn(|_| rng.next_u32());
        Self { round_keys, half_bits, half_mask: (1 << half_bits) - 1 }
    }

    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "a half has at most 32 bits")]
    fn permute(&self, value: u64) -> u64 {
        let mut left = value >> self.half_bits;
        let mut right = value & self.half_mask;
        for key in self.round_keys {
            let mixed = left ^ (u64::from(lowbias32(right as u32 ^ key)) & self.half_mask);
            left = right;
            right = mixed;
        }
        (left << self.half_bits) | right
    }
}

#[inline]
fn lowbias32(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^= x >> 16;
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(n: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let order = EpochOrder::new(n, seed, epoch, true);
        (0..n).map(|position| order.sample_at(position)).collect()
    }

    #[test]
    fn every_length_is_permuted() {
        for n in (1..70).chain([127, 128, 129, 1000, 1024, 1025, 60_000]) {
            let mut visited = order(n, 3, 5);
            visited.sort_unstable();
            assert!(visited.iter().copied().eq(0..n), "n = {n}");
        }
    }

    #[test]
    fn seeds_and_epochs_have_orders_of_their_own() {
        assert_eq!(order(1000, 1, 0), order(1000, 1, 0));
        assert_ne!(order(1000, 1, 0), order(1000, 2, 0));
        assert_ne!(order(1000, 1, 0), order(1000, 1, 1));
        assert_ne!(order(1000, 1, 0), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn without_shuffle_the_order_is_the_index() {
        let order = EpochOrder::new(10, 1, 1, false);
        assert!((0..10).all(|position| order.sample_at(position) == position));
    }

    /// Over many epochs each sample is equally often in each place, and neighbours are unrelated.
    #[test]
    fn positions_and_neighbours_are_uniform() {
        let (n, n_epochs) = (10usize, 20_000u64);
        let mut places = vec![0f64; n * n];
        let mut pairs = vec![0f64; n * n];
        for epoch in 0..n_epochs {
            let visited = order(n as u64, 9, epoch);
            for (place, &sample) in visited.iter().enumerate() {
                places[place * n + usize::try_from(sample).unwrap()] += 1.0;
            }
            let first = usize::try_from(visited[0]).unwrap();
            let second = usize::try_from(visited[1]).unwrap();
            pairs[first * n + second] += 1.0;
        }
        let chi2 = |counts: &[f64], expected: f64| -> f64 {
            counts.iter().filter(|&&c| c > 0.0).map(|c| (c - expected).powi(2) / expected).sum()
        };
        // 0.1 % points of chi-squared: 81 degrees of freedom 126.1, 89 degrees 136.0. The draw is
        // fixed, so this cannot fail by chance from one run to the next.
        let places_chi2 = chi2(&places, n_epochs as f64 / n as f64);
        assert!(places_chi2 < 126.1, "places {places_chi2}");
        let pairs_chi2 = chi2(&pairs, n_epochs as f64 / 90.0);
        assert!(pairs_chi2 < 136.0, "pairs {pairs_chi2}");
    }
}
