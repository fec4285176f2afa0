//! No slot is written while it is read: consumers that hold batches for random times look at every
//! byte of them when they come and again before they let go.
//!
//! With `FASTAA_CANARY_BATCHES=1000000` it looks at a million batches.

mod support;

use fastaa::transport::client::{ClientBatch, StreamClient};
use fastaa::transport::wire::{GroupMode, StreamRequest};
use support::{Host, N_SAMPLES, SIDE, label, next_batch, pixel, request};

const PLAIN: &str = r#"{"dtype": "u8", "policy": "none"}"#;
const N_SLOTS: u32 = 5;
const N_BATCHES_DEFAULT: u64 = 40_000;
/// Members of a group, and consumers for themselves.
const N_MEMBERS: u64 = 2;
const N_ALONE: u64 = 2;

/// A small generator: the consumers' whims must not depend on the code that is tested.
struct Whims(u64);

impl Whims {
    fn below(&mut self, n: usize) -> usize {
        // Marsaglia's xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % n as u64).expect("below a usize")
    }
}

/// Panics if any byte of the batch is not what its indices say.
fn check(batch: &ClientBatch, what: &str) {
    let indices = batch.indices();
    for (place, &index) in indices.iter().enumerate() {
        let sample_idx = usize::try_from(index).expect("small");
        assert!(sample_idx < N_SAMPLES, "{what}: sample {sample_idx}");
        let image = &batch.pixels()[place * SIDE * SIDE..][..SIDE * SIDE];
        let is_whole = (0..SIDE * SIDE).all(|at| image[at] == pixel(sample_idx, at));
        assert!(is_whole, "{what}: {:?}", batch.descriptor);
        let class = i64::from_ne_bytes(batch.labels()[place * 8..][..8].try_into().expect("8"));
        assert_eq!(class, i64::from(label(sample_idx)), "{what}");
    }
}

/// Reads `n_batches`, and more up to the epoch's end; gives the number of epochs.
fn consume(client: &mut StreamClient, n_batches: u64, mut whims: Whims) -> u64 {
    let (mut n_read, mut n_epochs) = (0, 0);
    let mut held: Vec<ClientBatch> = Vec::new();
    while n_read < n_batches {
        client.start(n_epochs, 0, "").expect("starts");
        let mut seen = [0u8; N_SAMPLES];
        assert!(matches!(
            client.next_event(),
            Ok(fastaa::transport::client::ClientEvent::Begin(_))
        ));
        // One slot stays free for the daemon, or it could never go on.
        while let Some(batch) = next_batch(client) {
            check(&batch, "when it came");
            for index in batch.indices() {
                seen[usize::try_from(index).expect("small")] += 1;
            }
            held.push(batch);
            n_read += 1;
            let n_kept = whims.below(N_SLOTS as usize);
            while held.len() > n_kept {
                let batch = held.swap_remove(whims.below(held.len()));
                check(&batch, "before it was let go");
            }
            if whims.below(64) == 0 {
                std::thread::yield_now();
            }
        }
        assert!(seen.iter().all(|&n| n == 1), "epoch {n_epochs}: a sample is lost, or came twice");
        n_epochs += 1;
    }
    n_epochs
}

#[test]
fn no_batch_changes_while_it_is_held() {
    let n_batches = std::env::var("FASTAA_CANARY_BATCHES").map_or(N_BATCHES_DEFAULT, |text| {
        text.parse().expect("FASTAA_CANARY_BATCHES is a number of batches")
    });
    let host = Host::new("");
    let _daemon = host.start();
    let n_each = n_batches / (N_MEMBERS + N_ALONE);
    let n_epochs: Vec<u64> = std::thread::scope(|scope| {
        let consumers: Vec<_> = (0..N_MEMBERS + N_ALONE)
            .map(|number| {
                let mut wanted = StreamRequest { n_slots: N_SLOTS, ..request(2, PLAIN) };
                if number < N_MEMBERS {
                    wanted.group = "canary".to_owned();
                    wanted.mode = GroupMode::Broadcast;
                }
                let mut client = host.connect(wanted).expect("connects");
                scope.spawn(move || consume(&mut client, n_each, Whims(number + 1)))
            })
            .collect();
        consumers.into_iter().map(|consumer| consumer.join().expect("no byte changed")).collect()
    });
    assert!(n_epochs.iter().all(|&n| n >= 3), "{n_epochs:?}");
}
