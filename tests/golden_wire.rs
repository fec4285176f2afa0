//! Golden bytes of the wire messages: one example of every message and enum variant.
//!
//! `tests/golden/wire.json` holds each example's bytes and its field values; the Python client's
//! tests decode and encode the same file (`tests/python/test_wire.py`). The bytes may change only
//! with `PROTOCOL_VERSION`; `UPDATE_GOLDEN=1 cargo test --test golden_wire` writes them anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use bincode::{Decode, Encode};
use fastaa::transport::wire::{
    BatchDescriptor, ClientBody, ClientFrame, ClientHello, DaemonBody, DaemonFrame, EpochBegin,
    EpochEnd, ErrorCode, GpuMemory, GroupMode, HelloReply, PROTOCOL_VERSION, Refusal, ServerHello,
    SlotLease, Start, StreamRequest, Welcome, WireDtype, WireError, WireLabels, WireLayout, decode,
    encode,
};
use serde_json::{Value, json};

const SESSION: u64 = 0x0123_4567_89AB_CDEF;
const ID: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255];

/// One example: how it is called, its message type, its bytes and its values.
struct Example {
    name: String,
    message: &'static str,
    bytes: Vec<u8>,
    value: Value,
}

/// Encodes, and proves on the way that the bytes decode to the same value again.
fn example<M: Encode + Decode<()> + PartialEq + std::fmt::Debug>(
    name: &str,
    message: &'static str,
    example: &M,
    value: Value,
) -> Example {
    let bytes = encode(example).expect("an example is small");
    assert_eq!(&decode::<M>(&bytes).expect("what was encoded decodes"), example, "{name}");
    Example { name: name.to_owned(), message, bytes, value }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

fn request(mode: GroupMode) -> StreamRequest {
    StreamRequest {
        dataset: "fashion-mnist".to_owned(),
        split: "train".to_owned(),
        batch_size: 256,
        seed: u64::MAX,
        rank: 1,
        world_size: 3,
        drop_last: true,
        shuffle: false,
        group: "größe".to_owned(),
        mode,
        recipe_json: r#"{"policy":"active"}"#.to_owned(),
        n_slots: 8,
        replay: true,
        gpu: Some(ID),
    }
}

fn request_json(mode: &str) -> Value {
    json!({
        "dataset": "fashion-mnist", "split": "train", "batch_size": 256, "seed": u64::MAX,
        "rank": 1, "world_size": 3, "drop_last": true, "shuffle": false, "group": "größe",
        "mode": mode, "recipe_json": r#"{"policy":"active"}"#, "n_slots": 8,
        "replay": true, "gpu": hex(&ID),
    })
}

fn client_hello(mode: GroupMode) -> ClientHello {
    ClientHello {
        protocol: PROTOCOL_VERSION,
        client: "golden 0.1.0".to_owned(),
        token: "secret".to_owned(),
        request: request(mode),
    }
}

fn client_hello_json(mode: &str) -> Value {
    json!({
        "protocol": PROTOCOL_VERSION, "client": "golden 0.1.0", "token": "secret",
        "request": request_json(mode),
    })
}

fn welcome(dtype: WireDtype, layout: WireLayout, labels: WireLabels) -> Welcome {
    Welcome {
        session: SESSION,
        token: ID,
        endpoint: "ipc:///run/fastaa/data.sock".to_owned(),
        slot_bytes: 807_040,
        n_slots: 8,
        labels_offset: 802_816,
        indices_offset: 804_864,
        batch_size: 256,
        height: 28,
        width: 29,
        channels: 1,
        dtype,
        layout,
        labels,
        n_samples: 60_000,
        fingerprint: "0a1b2c".to_owned(),
        recipe_json: "{}".to_owned(),
        daemon_version: "0.1.0".to_owned(),
        n_window_slots: 16,
        gpu: Some(Box::new(GpuMemory {
            memory: [7; 64],
            events: vec![[8; 64], [9; 64]],
            slot_bytes: 3_215_360,
            labels_offset: 3_211_264,
        })),
        gpu_refused: "none".into(),
    }
}

fn welcome_json(dtype: &str, layout: &str, labels: Value) -> Value {
    json!({"protocol": PROTOCOL_VERSION, "reply": {"Welcome": {
        "session": SESSION, "token": hex(&ID), "endpoint": "ipc:///run/fastaa/data.sock",
        "slot_bytes": 807_040, "n_slots": 8, "labels_offset": 802_816, "indices_offset": 804_864,
        "batch_size": 256, "height": 28, "width": 29, "channels": 1, "dtype": dtype,
        "layout": layout, "labels": labels, "n_samples": 60_000, "fingerprint": "0a1b2c",
        "recipe_json": "{}", "daemon_version": "0.1.0", "n_window_slots": 16,
        "gpu": {"memory": hex(&[7; 64]), "events": [hex(&[8; 64]), hex(&[9; 64])],
            "slot_bytes": 3_215_360, "labels_offset": 3_211_264},
        "gpu_refused": "none",
    }}})
}

fn refusal(code: ErrorCode) -> Refusal {
    Refusal { code, message: "no such dataset".to_owned(), hint: String::new() }
}

fn hello_examples() -> Vec<Example> {
    let mut examples = Vec::new();
    for (mode, name) in [(GroupMode::Shard, "Shard"), (GroupMode::Broadcast, "Broadcast")] {
        examples.push(example(
            &format!("client hello, {name}"),
            "ClientHello",
            &client_hello(mode),
            client_hello_json(name),
        ));
    }
    let classes = || (WireLabels::Class { n_classes: 10 }, json!({"Class": {"n_classes": 10}}));
    let vector = || (WireLabels::Vector { len: 4 }, json!({"Vector": {"len": 4}}));
    let welcomes = [
        ((WireDtype::U8, "U8"), (WireLayout::Nchw, "Nchw"), classes()),
        ((WireDtype::F16, "F16"), (WireLayout::Nhwc, "Nhwc"), classes()),
        ((WireDtype::Bf16, "Bf16"), (WireLayout::Nchw, "Nchw"), vector()),
        ((WireDtype::F32, "F32"), (WireLayout::Nhwc, "Nhwc"), vector()),
    ];
    for ((dtype, dtype_name), (layout, layout_name), (labels, labels_json)) in welcomes {
        examples.push(example(
            &format!("server hello, welcome, {dtype_name}, {layout_name}"),
            "ServerHello",
            &ServerHello {
                protocol: PROTOCOL_VERSION,
                reply: HelloReply::Welcome(welcome(dtype, layout, labels)),
            },
            welcome_json(dtype_name, layout_name, labels_json),
        ));
    }
    for (code, name) in [
        (ErrorCode::Protocol, "Protocol"),
        (ErrorCode::Malformed, "Malformed"),
        (ErrorCode::Forbidden, "Forbidden"),
        (ErrorCode::NotFound, "NotFound"),
        (ErrorCode::Invalid, "Invalid"),
        (ErrorCode::Exhausted, "Exhausted"),
        (ErrorCode::Data, "Data"),
        (ErrorCode::Stopping, "Stopping"),
        (ErrorCode::Internal, "Internal"),
        (ErrorCode::Gpu, "Gpu"),
    ] {
        examples.push(example(
            &format!("server hello, refused, {name}"),
            "ServerHello",
            &ServerHello { protocol: PROTOCOL_VERSION, reply: HelloReply::Refused(refusal(code)) },
            json!({"protocol": PROTOCOL_VERSION, "reply": {"Refused": {
                "code": name, "message": "no such dataset", "hint": "",
            }}}),
        ));
    }
    examples
}

fn client_examples() -> Vec<Example> {
    let lease = |slot, generation| SlotLease { slot, generation };
    let bodies = [
        (
            "start",
            ClientBody::Start(Start {
                seek: 1,
                epoch: 2,
                offset: 1 << 40,
                policy: "toy@3".to_owned(),
            }),
            json!({"Start": {"seek": 1, "epoch": 2, "offset": 1_u64 << 40, "policy": "toy@3"}}),
        ),
        ("release of nothing", ClientBody::Release(Vec::new()), json!({"Release": []})),
        (
            "release of one",
            ClientBody::Release(vec![lease(7, 9)]),
            json!({"Release": [{"slot": 7, "generation": 9}]}),
        ),
        (
            "release of two",
            ClientBody::Release(vec![lease(0, 1), lease(5, u32::MAX)]),
            json!({"Release": [
                {"slot": 0, "generation": 1}, {"slot": 5, "generation": u32::MAX},
            ]}),
        ),
        ("bye", ClientBody::Bye, json!("Bye")),
        (
            "hello over TCP",
            ClientBody::Hello(client_hello(GroupMode::Shard)),
            json!({"Hello": client_hello_json("Shard")}),
        ),
    ];
    bodies
        .into_iter()
        .map(|(name, body, value)| {
            example(
                &format!("client frame, {name}"),
                "ClientFrame",
                &ClientFrame { protocol: PROTOCOL_VERSION, session: SESSION, body },
                json!({"protocol": PROTOCOL_VERSION, "session": SESSION, "body": value}),
            )
        })
        .collect()
}

fn batch(inline: bool, last: bool) -> (DaemonBody, Value) {
    let body = DaemonBody::Batch(BatchDescriptor {
        seek: 1,
        slot: 2,
        generation: 3,
        n_samples: 4,
        epoch: 5,
        step: 6,
        next_offset: 7,
        policy_id: ID,
        policy_version: 8,
        n_global: 9,
        inline,
        last,
        window_slot: 10,
    });
    let value = json!({"Batch": {
        "seek": 1, "slot": 2, "generation": 3, "n_samples": 4, "epoch": 5, "step": 6,
        "next_offset": 7, "policy_id": hex(&ID), "policy_version": 8, "n_global": 9,
        "inline": inline, "last": last, "window_slot": 10,
    }});
    (body, value)
}

fn daemon_examples() -> Vec<Example> {
    let (first, first_json) = batch(false, false);
    let (last, last_json) = batch(true, true);
    let bodies = [
        ("batch", first, first_json),
        ("last batch, inline", last, last_json),
        (
            "epoch end",
            DaemonBody::EpochEnd(EpochEnd { seek: 1, epoch: 2, n_steps: 235 }),
            json!({"EpochEnd": {"seek": 1, "epoch": 2, "n_steps": 235}}),
        ),
        (
            "failed",
            DaemonBody::Failed(refusal(ErrorCode::Data)),
            json!({"Failed": {"code": "Data", "message": "no such dataset", "hint": ""}}),
        ),
        (
            "goodbye",
            DaemonBody::Goodbye("the daemon stops".to_owned()),
            json!({"Goodbye": "the daemon stops"}),
        ),
        (
            "hello over TCP",
            DaemonBody::Hello(ServerHello {
                protocol: PROTOCOL_VERSION,
                reply: HelloReply::Refused(refusal(ErrorCode::Forbidden)),
            }),
            json!({"Hello": {"protocol": PROTOCOL_VERSION, "reply": {"Refused": {
                "code": "Forbidden", "message": "no such dataset", "hint": "",
            }}}}),
        ),
        (
            "epoch begin",
            DaemonBody::EpochBegin(EpochBegin {
                seek: 1,
                epoch: 2,
                policy: "toy@3".to_owned(),
                policy_id: ID,
                policy_version: 3,
            }),
            json!({"EpochBegin": {
                "seek": 1, "epoch": 2, "policy": "toy@3", "policy_id": hex(&ID),
                "policy_version": 3,
            }}),
        ),
    ];
    bodies
        .into_iter()
        .map(|(name, body, value)| {
            example(
                &format!("daemon frame, {name}"),
                "DaemonFrame",
                &DaemonFrame { protocol: PROTOCOL_VERSION, session: SESSION, body },
                json!({"protocol": PROTOCOL_VERSION, "session": SESSION, "body": value}),
            )
        })
        .collect()
}

fn examples() -> Vec<Example> {
    [hello_examples(), client_examples(), daemon_examples()].into_iter().flatten().collect()
}

fn golden_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/wire.json")
}

#[test]
fn every_message_has_the_golden_bytes() {
    let current = Value::Array(
        examples()
            .iter()
            .map(|example| {
                json!({
                    "name": example.name, "message": example.message,
                    "hex": hex(&example.bytes), "value": example.value,
                })
            })
            .collect(),
    );
    let path = golden_path();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let text = serde_json::to_string_pretty(&current).expect("a Value has text");
        std::fs::write(&path, text + "\n").expect("the golden file can be written");
    }
    let text = std::fs::read_to_string(&path).expect("tests/golden/wire.json is committed");
    let golden: Value = serde_json::from_str(&text).expect("the golden file is JSON");
    assert_eq!(
        golden, current,
        "the bytes on the wire have changed: raise PROTOCOL_VERSION, then write them anew with \
         UPDATE_GOLDEN=1"
    );
}

#[test]
fn a_truncated_message_is_refused_at_every_length() {
    for example in examples() {
        for len in 0..example.bytes.len() {
            let cut = &example.bytes[..len];
            let refused = match example.message {
                "ClientHello" => decode::<ClientHello>(cut).is_err(),
                "ServerHello" => decode::<ServerHello>(cut).is_err(),
                "ClientFrame" => decode::<ClientFrame>(cut).is_err(),
                _ => decode::<DaemonFrame>(cut).is_err(),
            };
            assert!(refused, "{} decodes from its first {len} bytes", example.name);
        }
    }
}

#[test]
fn another_version_and_trailing_bytes_are_refused() {
    for example in daemon_examples() {
        let mut longer = example.bytes.clone();
        longer.push(0);
        assert!(
            matches!(decode::<DaemonFrame>(&longer), Err(WireError::Malformed(_))),
            "{}",
            example.name
        );
        let mut newer = example.bytes;
        newer[0] += 1;
        assert!(
            matches!(
                decode::<DaemonFrame>(&newer),
                Err(WireError::Version { theirs }) if theirs == PROTOCOL_VERSION + 1
            ),
            "{}",
            example.name
        );
    }
}

#[test]
fn a_batch_descriptor_is_short() {
    let (body, _) = batch(true, true);
    let frame = DaemonFrame { protocol: PROTOCOL_VERSION, session: SESSION, body };
    let n_bytes = encode(&frame).expect("a descriptor is small").len();
    assert!(n_bytes <= 256, "guarantee 4: at most 256 bytes, not {n_bytes}");
}
