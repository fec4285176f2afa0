//! Samples that a batch leaves out: they go to its end, the others close up in order.
//!
//! A batch always has places for all samples that its plan names. Of one that is skipped, the index
//! is marked ([`skipped_mark`]); when the batch is done, what follows a gap moves up, and the marks
//! come last. So the reader takes the samples before the first mark, and still learns which ones
//! were skipped: the digest of an epoch counts them, too.

/// The index of a skipped sample: negative, and its own inverse.
pub fn skipped_mark(index: i64) -> i64 {
    -1 - index
}

/// A finished part of a batch.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) first_position: u64,
    pub(super) pixels: &'static mut [u8],
    pub(super) labels: &'static mut [u8],
    pub(super) indices: &'static mut [u8],
}

impl Part {
    fn len(&self) -> usize {
        self.indices.len() / size_of::<i64>()
    }

    fn index(&self, place: usize) -> i64 {
        let bytes = self.indices.as_chunks::<8>().0[place];
        i64::from_ne_bytes(bytes)
    }

    fn set_index(&mut self, place: usize, index: i64) {
        self.indices.as_chunks_mut::<8>().0[place] = index.to_ne_bytes();
    }
}

/// Moves samples up over the gaps of a batch, whose parts may come in any order.
pub(super) fn close_gaps(parts: &mut [Part], pixel_bytes: usize, label_bytes: usize) {
    parts.sort_by_key(|part| part.first_position);
    let places: Vec<(usize, usize)> = parts
        .iter()
        .enumerate()
        .flat_map(|(part_idx, part)| (0..part.len()).map(move |place| (part_idx, place)))
        .collect();
    let is_gap = |parts: &[Part], at: usize| parts[places[at].0].index(places[at].1) < 0;
    let Some(first) = (0..places.len()).find(|at| is_gap(parts, *at)) else { return };
    let mut marks = Vec::new();
    let mut to = first;
    for from in first..places.len() {
        let (part_idx, place) = places[from];
        let index = parts[part_idx].index(place);
        if index < 0 {
            marks.push(index);
            continue;
        }
        move_up(parts, places[to], places[from], pixel_bytes, label_bytes);
        to += 1;
    }
    for (at, mark) in (to..).zip(marks) {
        let (part_idx, place) = places[at];
        parts[part_idx].set_index(place, mark);
    }
}

/// Copies the sample at `from` to `to`, which comes before it.
fn move_up(
    parts: &mut [Part],
    to: (usize, usize),
    from: (usize, usize),
    pixel_bytes: usize,
    label_bytes: usize,
) {
    let index = parts[from.0].index(from.1);
    parts[to.0].set_index(to.1, index);
    let range = |place: usize, bytes: usize| place * bytes..(place + 1) * bytes;
    if to.0 == from.0 {
        let part = &mut parts[to.0];
        part.pixels.copy_within(range(from.1, pixel_bytes), to.1 * pixel_bytes);
        part.labels.copy_within(range(from.1, label_bytes), to.1 * label_bytes);
        return;
    }
    let (before, after) = parts.split_at_mut(from.0);
    let (target, source) = (&mut before[to.0], &after[0]);
    target.pixels[range(to.1, pixel_bytes)]
        .copy_from_slice(&source.pixels[range(from.1, pixel_bytes)]);
    target.labels[range(to.1, label_bytes)]
        .copy_from_slice(&source.labels[range(from.1, label_bytes)]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leak(bytes: Vec<u8>) -> &'static mut [u8] {
        Vec::leak(bytes)
    }

    proptest! {
        #[test]
        fn what_is_left_closes_up_in_order(
            is_skipped in prop::collection::vec(any::<bool>(), 1..30),
            per_part in 1_usize..8,
        ) {
            let numbers: Vec<u8> = (0..30).collect();
            let samples: Vec<(u8, bool)> = numbers.iter().copied().zip(is_skipped).collect();
            let mut parts: Vec<Part> = samples
                .chunks(per_part)
                .enumerate()
                .map(|(part_idx, samples)| Part {
                    first_position: (part_idx * per_part) as u64,
                    pixels: leak(samples.iter().flat_map(|(n, _)| [*n; 3]).collect()),
                    labels: leak(samples.iter().flat_map(|(n, _)| [*n; 2]).collect()),
                    indices: leak(samples.iter().flat_map(|(n, is_skipped)| {
                        let index = i64::from(*n);
                        if *is_skipped { skipped_mark(index) } else { index }.to_ne_bytes()
                    }).collect()),
                })
                .collect();
            parts.reverse();
            close_gaps(&mut parts, 3, 2);
            let all = |bytes: fn(&Part) -> &[u8]| -> Vec<u8> {
                parts.iter().flat_map(|part| bytes(part).to_vec()).collect()
            };
            let kept: Vec<u8> =
                samples.iter().filter(|(_, skipped)| !skipped).map(|(n, _)| *n).collect();
            let pixels: Vec<u8> = kept.iter().flat_map(|n| [*n; 3]).collect();
            let labels: Vec<u8> = kept.iter().flat_map(|n| [*n; 2]).collect();
            prop_assert_eq!(&all(|part| part.pixels)[..pixels.len()], &pixels[..]);
            prop_assert_eq!(&all(|part| part.labels)[..labels.len()], &labels[..]);
            let skipped = samples.iter().filter(|(_, skipped)| *skipped);
            let expected: Vec<i64> = kept
                .iter()
                .map(|n| i64::from(*n))
                .chain(skipped.map(|(n, _)| skipped_mark(i64::from(*n))))
                .collect();
            let indices: Vec<i64> =
                parts.iter().flat_map(|part| (0..part.len()).map(|at| part.index(at))).collect();
            prop_assert_eq!(indices, expected);
        }
    }
}
