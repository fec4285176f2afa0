//! Streams of the real daemon, read by the real Rust client: bytes, order, sharing, memory.

mod support;

use fastaa::transport::client::ClientEvent;
use fastaa::transport::wire::{
    self, ClientBody, ClientFrame, DaemonBody, DaemonFrame, PROTOCOL_VERSION, SlotLease,
    StreamRequest,
};
use sha2::{Digest, Sha256};
use support::{Epoch, Host, N_SAMPLES, SIDE, label, next_batch, pixel, read_epoch, request};

/// Uses every part of a recipe.
const BUSY: &str = r#"{"crop": {"kind": "pad", "size": 12, "pad": 2}, "hflip": true,
    "policy": "trivial-wide", "cutout": 4, "normalize": {"mean": [0.3], "std": [0.4]},
    "dtype": "DTYPE", "layout": "LAYOUT"}"#;

fn busy(dtype: &str, layout: &str) -> String {
    BUSY.replace("DTYPE", dtype).replace("LAYOUT", layout)
}

fn sha256(epoch: &Epoch) -> String {
    let mut hash = Sha256::new();
    hash.update(&epoch.pixels);
    hash.update(&epoch.labels);
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn plain_samples_arrive_as_they_are_in_index_order() {
    let host = Host::new("");
    let daemon = host.start();
    let plain = r#"{"dtype": "u8", "policy": "none"}"#;
    let mut client =
        host.connect(StreamRequest { shuffle: false, ..request(96, plain) }).expect("connects");
    let epoch = read_epoch(&mut client, 0);
    assert!(epoch.indices.iter().copied().eq(0..N_SAMPLES as u64));
    for sample_idx in 0..N_SAMPLES {
        let image = &epoch.pixels[sample_idx * SIDE * SIDE..][..SIDE * SIDE];
        assert!((0..SIDE * SIDE).all(|at| image[at] == pixel(sample_idx, at)), "{sample_idx}");
        let class = i64::from_ne_bytes(epoch.labels[sample_idx * 8..][..8].try_into().unwrap());
        assert_eq!(class, i64::from(label(sample_idx)));
    }
    drop(client);
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn an_epoch_s_bytes_do_not_depend_on_threads_or_restarts() {
    let host = Host::new("");
    let mut hashes = Vec::new();
    for threads in [1, 2, 4, 4] {
        host.configure(&format!("[workers]\nthreads = {threads}"));
        let daemon = host.start();
        let mut client = host.connect(request(64, &busy("f32", "nchw"))).expect("connects");
        hashes.push([sha256(&read_epoch(&mut client, 0)), sha256(&read_epoch(&mut client, 1))]);
        drop(client);
        assert_eq!(daemon.stop(), 0);
    }
    assert!(hashes.iter().all(|pair| *pair == hashes[0]), "{hashes:?}");
    assert_ne!(hashes[0][0], hashes[0][1], "epochs differ");
}

#[test]
fn every_dtype_and_layout_is_the_u8_stream_after_conversion() {
    let host = Host::new("");
    let _daemon = host.start();
    let read = |dtype: &str, layout: &str| {
        let mut client = host.connect(request(100, &busy(dtype, layout))).expect("connects");
        read_epoch(&mut client, 3)
    };
    for layout in ["nchw", "nhwc"] {
        let bytes = read("u8", layout).pixels;
        let normalised: Vec<f32> =
            bytes.iter().map(|&byte| (f32::from(byte) / 255.0 - 0.3) / 0.4).collect();
        let f32s: Vec<u8> = normalised.iter().flat_map(|value| value.to_ne_bytes()).collect();
        assert!(read("f32", layout).pixels == f32s, "f32 {layout}");
        let f16s: Vec<u8> =
            normalised.iter().flat_map(|&value| half::f16::from_f32(value).to_ne_bytes()).collect();
        assert!(read("f16", layout).pixels == f16s, "f16 {layout}");
        let bf16s: Vec<u8> = normalised
            .iter()
            .flat_map(|&value| half::bf16::from_f32(value).to_ne_bytes())
            .collect();
        assert!(read("bf16", layout).pixels == bf16s, "bf16 {layout}");
    }
}

#[test]
fn ranks_share_an_epoch_and_any_world_size_resumes_it() {
    let host = Host::new("");
    let _daemon = host.start();
    let plain = r#"{"dtype": "u8", "policy": "none"}"#;
    let mut visited = Vec::new();
    let mut offset = 0;
    // Two ranks make three steps, then three ranks finish the epoch.
    for (world_size, n_steps) in [(2, 3), (3, usize::MAX)] {
        let mut next_offset = offset;
        for rank in 0..world_size {
            let shard = StreamRequest { rank, world_size, ..request(70, plain) };
            let mut client = host.connect(shard).expect("connects");
            client.start(5, offset, "").expect("starts");
            assert!(matches!(client.next_event().expect("an event"), ClientEvent::Begin(_)));
            for _ in 0..n_steps {
                let Some(batch) = next_batch(&mut client) else { break };
                visited.extend(batch.indices());
                next_offset = batch.descriptor.next_offset;
            }
        }
        offset = next_offset;
    }
    let mut whole = host.connect(request(1000, plain)).expect("connects");
    let mut expected = read_epoch(&mut whole, 5).indices;
    expected.sort_unstable();
    visited.sort_unstable();
    assert_eq!(visited, expected);
}

#[test]
fn a_held_slot_is_not_rewritten_and_the_stream_waits_for_it() {
    let host = Host::new("");
    let _daemon = host.start();
    let slots = StreamRequest { n_slots: 3, ..request(10, r#"{"dtype": "u8"}"#) };
    let mut client = host.connect(slots).expect("connects");
    client.start(0, 0, "").expect("starts");
    assert!(matches!(client.next_event().expect("an event"), ClientEvent::Begin(_)));
    let held = next_batch(&mut client).expect("a batch");
    let bytes = held.pixels().to_vec();
    let mut n_batches = 1;
    while let Some(batch) = next_batch(&mut client) {
        assert_ne!(batch.descriptor.slot, held.descriptor.slot);
        n_batches += 1;
    }
    assert_eq!(n_batches, N_SAMPLES / 10);
    assert!(held.pixels() == bytes, "nobody wrote to the held slot");
}

#[test]
fn a_local_batch_costs_at_most_256_bytes_on_zeromq() {
    let host = Host::new("");
    let _daemon = host.start();
    let mut client = host.connect(request(50, "{}")).expect("connects");
    client.start(0, 0, "").expect("starts");
    assert!(matches!(client.next_event().expect("an event"), ClientEvent::Begin(_)));
    let batch = next_batch(&mut client).expect("a batch");
    let (protocol, session) = (PROTOCOL_VERSION, client.welcome().session);
    let there = DaemonFrame { protocol, session, body: DaemonBody::Batch(batch.descriptor) };
    let lease = SlotLease { slot: batch.descriptor.slot, generation: batch.descriptor.generation };
    let back = ClientFrame { protocol, session, body: ClientBody::Release(vec![lease]) };
    // ZMTP adds two bytes to a short frame; routing ids are sent once, at the handshake.
    let n_bytes = wire::encode(&there).unwrap().len() + 2 + wire::encode(&back).unwrap().len() + 2;
    assert!(n_bytes <= 256, "{n_bytes} bytes");
}

#[test]
fn slabs_have_no_name_in_dev_shm() {
    let host = Host::new("");
    let daemon = host.start();
    let mut client = host.connect(request(50, "{}")).expect("connects");
    client.start(0, 0, "").expect("starts");
    assert!(matches!(client.next_event().expect("an event"), ClientEvent::Begin(_)));
    let _held = next_batch(&mut client).expect("a batch");
    // What both sides have mapped: the slab is there, and is an anonymous file.
    for pid in [daemon.child.id(), std::process::id()] {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("reads the maps");
        assert!(maps.contains("/memfd:fastaa-slab"), "{maps}");
        assert!(!maps.contains("/dev/shm/"), "{maps}");
    }
}

#[test]
fn a_batch_size_beyond_the_dataset_gives_one_batch() {
    let host = Host::new("");
    let _daemon = host.start();
    let mut client = host.connect(request(1 << 20, "{}")).expect("connects");
    assert_eq!(client.welcome().batch_size, 1 << 20);
    assert_eq!(read_epoch(&mut client, 0).indices.len(), N_SAMPLES);
}
