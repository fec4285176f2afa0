//! Counter-based randomness: every random number is a pure function of what it is for.
//!
//! Owns the generator (Philox4x32-10) and the list of purposes. Never holds shared state: a
//! [`SampleRng`] is made for one (seed, epoch, sample, purpose) and thrown away.
//!
//! *Source*: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11; constants
//! and known answers from the Random123 distribution (`kat_vectors`).

/// What a stream of random numbers is used for. Values are part of the determinism contract:
/// append, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// Position of the recipe's random crop.
    Crop = 1,
    /// The recipe's horizontal flip.
    Flip = 2,
    /// Sub-policy, probabilities, magnitudes, signs and positions of the policy's operations.
    Policy = 3,
    /// Position of the recipe's cutout box.
    Cutout = 4,
    /// Round keys of the epoch's order.
    Order = 5,
    /// Which samples of a class go to D_gate.
    GateOrder = 6,
    /// Which samples of a class the search takes, and into which fold.
    FoldOrder = 7,
    /// Which sample comes in the place of one that cannot be read.
    Substitute = 8,
    /// Colour jitter of the recipe.
    Jitter = 9,
    /// The recipe's erased box.
    Erase = 10,
    /// Mixture of a pair of samples.
    Mix = 11,
    /// Points that the policy search proposes; the "epoch" is the place in the space, the "sample"
    /// the trial.
    Proposal = 16,
    /// Initial weights of fold models; the "epoch" is the tensor, the "sample" a part of it.
    InitialWeights = 20,
}

const PHILOX_M0: u32 = 0xD251_1F53;
const PHILOX_M1: u32 = 0xCD9E_8D57;
const PHILOX_W0: u32 = 0x9E37_79B9;
const PHILOX_W1: u32 = 0xBB67_AE85;
const PHILOX_ROUNDS: u32 = 10;

/// One Philox4x32-10 block: 128 random bits for a 128-bit counter under a 64-bit key.
#[inline]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..PHILOX_ROUNDS {
        if round > 0 {
            key[0] = key[0].wrapping_add(PHILOX_W0);
            key[1] = key[1].wrapping_add(PHILOX_W1);
        }
        let (hi0, lo0) = mul_hi_lo(PHILOX_M0, counter[0]);
        let (hi1, lo1) = mul_hi_lo(PHILOX_M1, counter[2]);
        counter = [hi1 ^ counter[1] ^ key[0], lo1, hi0 ^ counter[3] ^ key[1], lo0];
    }
    counter
}

#[inline]
#[allow(
    clippy::cast_possible_truncation,
    reason = "splitting a 64-bit product in two is the point"
)]
fn mul_hi_lo(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

/// A bijective 64-bit mixer, for digests that do not depend on order: the digest of an epoch is the
/// wrapping sum of `mix64(sample index + 1)`.
///
/// *Source*: the first output of SplitMix64 (G. L. Steele et al., OOPSLA 2014) from the state
/// `value`.
#[inline]
pub fn mix64(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Random numbers for one purpose of one sample in one epoch.
///
/// The 64-bit seed is the Philox key; the counter is
///
/// | word | content |
/// |---|---|
/// | 0 | block number (bits 0–15), purpose (bits 16–23), epoch bits 32–39 (bits 24–31) |
/// | 1 | epoch bits 0–31 |
/// | 2, 3 | sample index, low word first |
///
/// so that 2^16 blocks of four words, 2^40 epochs and 2^64 samples never share a counter.
#[derive(Clone, Debug)]
pub struct SampleRng {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl SampleRng {
    /// The stream of numbers for (seed, epoch, sample, purpose).
    #[allow(clippy::cast_possible_truncation, reason = "words of 64-bit values")]
    pub fn new(seed: u64, epoch: u64, sample_idx: u64, purpose: Purpose) -> Self {
        let epoch_high = ((epoch >> 32) as u32 & 0xFF) << 24;
        let counter = [
            epoch_high | (u32::from(purpose as u8) << 16),
            epoch as u32,
            sample_idx as u32,
            (sample_idx >> 32) as u32,
        ];
        Self { key: [seed as u32, (seed >> 32) as u32], counter, block: [0; 4], used: 4 }
    }

    /// The next 32 random bits.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32(self.counter, self.key);
            assert!(self.counter[0] & 0xFFFF != 0xFFFF, "a sample used 2^18 random words");
            self.counter[0] += 1;
            self.used = 0;
        }
        let word = self.block[self.used];
        self.used += 1;
        word
    }

    /// Uniform in [0, 1): the top 24 bits, so that every value is exact in f32 and in f64.
    #[inline]
    pub fn unit(&mut self) -> f64 {
        f64::from(self.next_u32() >> 8) / f64::from(1u32 << 24)
    }

    /// Uniform in `0..n` by the multiply-shift method (bias below n / 2^32). `n` is at least 1.
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "the product's high word is below n")]
    pub fn below(&mut self, n: u32) -> u32 {
        debug_assert!(n > 0, "an empty range has no member");
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// A fair coin.
    #[inline]
    pub fn coin(&mut self) -> bool {
        self.next_u32() >> 31 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([0xffff_ffff; 4], [0xffff_ffff; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// First outputs of `splitmix64.c` (S. Vigna) for the states 0 and 1234567.
    #[test]
    fn mix64_is_splitmix64() {
        assert_eq!(mix64(0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(mix64(1_234_567), 6_457_827_717_110_365_317);
    }

    #[test]
    fn purposes_epochs_and_samples_have_streams_of_their_own() {
        let first =
            |seed, epoch, sample, purpose| SampleRng::new(seed, epoch, sample, purpose).next_u32();
        let base = first(1, 2, 3, Purpose::Crop);
        assert_eq!(base, first(1, 2, 3, Purpose::Crop));
        for other in [
            first(2, 2, 3, Purpose::Crop),
            first(1, 3, 3, Purpose::Crop),
            first(1, 2, 4, Purpose::Crop),
            first(1, 2, 3, Purpose::Flip),
            first(1, 2 + (1 << 32), 3, Purpose::Crop),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn uniform_draws_stay_in_range_and_are_flat() {
        let mut bins = [0u32; 10];
        for sample in 0..20_000 {
            let mut rng = SampleRng::new(7, 0, sample, Purpose::Policy);
            let unit = rng.unit();
            assert!((0.0..1.0).contains(&unit));
            bins[rng.below(10) as usize] += 1;
        }
        // Chi-squared with 9 degrees of freedom: 27.9 is the 0.1 % point; the draw is fixed.
        let chi2: f64 = bins.iter().map(|&n| (f64::from(n) - 2000.0).powi(2) / 2000.0).sum();
        assert!(chi2 < 27.9, "chi-squared {chi2}");
    }
}
