//! Garbage and lies on both sockets: a clear answer or none, and nobody else notices.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use fastaa::transport::wire::{
    self, ClientBody, ClientFrame, ClientHello, DaemonBody, DaemonFrame, ErrorCode, HelloReply,
    PROTOCOL_VERSION, Refusal, ServerHello, SlotLease, Start,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::Value;
use support::{Host, next_batch, read_epoch, request};

/// Sends bytes as a hello and gives the daemon's answer.
fn hello(host: &Host, bytes: &[u8]) -> Refusal {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket");
    let address = SocketAddrUnix::new(host.hello_socket()).expect("a short path");
    rustix::net::connect(&socket, &address).expect("connects");
    rustix::net::send(&socket, bytes, SendFlags::NOSIGNAL).expect("sends");
    let mut answer = vec![0; 65_536];
    let (_, n_bytes) =
        rustix::net::recv(&socket, &mut answer, RecvFlags::empty()).expect("an answer");
    match wire::decode::<ServerHello>(&answer[..n_bytes]).expect("is a hello").reply {
        HelloReply::Refused(refusal) => refusal,
        HelloReply::Welcome(_) => panic!("let in"),
    }
}

fn good_hello() -> Vec<u8> {
    wire::encode(&ClientHello {
        protocol: PROTOCOL_VERSION,
        client: "test".to_owned(),
        token: String::new(),
        request: request(10, "{}"),
    })
    .expect("encodes")
}

fn counters(host: &Host) -> Value {
    let (code, stdout, stderr) = host.ctl(&["--json", "status"]);
    assert_eq!(code, 0, "{stderr}");
    let status: Value = serde_json::from_str(&stdout).expect("is JSON");
    status["counters"].clone()
}

#[test]
fn another_protocol_version_is_refused_in_words() {
    let host = Host::new("");
    let _daemon = host.start();
    for (version, cure) in
        [(0u16, "update the client"), (PROTOCOL_VERSION + 1, "update the daemon")]
    {
        let mut bytes = good_hello();
        bytes[..2].copy_from_slice(&version.to_le_bytes());
        let refusal = hello(&host, &bytes);
        assert_eq!(refusal.code, ErrorCode::Protocol);
        let expected = format!("the client speaks protocol version {version}");
        assert!(refusal.message.contains(&expected), "{refusal:?}");
        assert_eq!(refusal.hint, cure);
    }
}

#[test]
fn garbage_on_the_hello_socket_is_refused_in_words() {
    let host = Host::new("");
    let _daemon = host.start();
    let good = good_hello();
    let mut trailing = good.clone();
    trailing.push(0);
    // A string that claims to be 2^60 bytes long.
    let mut huge = good[..2].to_vec();
    huge.extend((1u64 << 60).to_le_bytes());
    let mut cases = vec![trailing, huge, b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![1]];
    cases.extend((2..good.len()).step_by(7).map(|cut| good[..cut].to_vec()));
    for case in cases {
        let refusal = hello(&host, &case);
        let expected = [ErrorCode::Malformed, ErrorCode::Protocol];
        assert!(expected.contains(&refusal.code), "{refusal:?} for {case:?}");
        assert!(!refusal.message.is_empty() && !refusal.hint.is_empty(), "{refusal:?}");
    }
    read_epoch(&mut host.connect(request(10, "{}")).expect("connects"), 0);
}

#[test]
fn garbage_on_the_data_socket_disturbs_nobody() {
    let host = Host::new("");
    let _daemon = host.start();
    let mut client = host.connect(request(10, "{}")).expect("connects");
    let context = zmq::Context::new();
    let stranger = context.socket(zmq::DEALER).expect("a socket");
    let endpoint = format!("ipc://{}", host.path("run/data.sock").display());
    stranger.connect(&endpoint).expect("connects");
    let frame = |session, body| {
        wire::encode(&ClientFrame { protocol: PROTOCOL_VERSION, session, body }).expect("encodes")
    };
    let session = client.welcome().session;
    let start = Start { seek: 1, epoch: 0, offset: 0, policy: String::new() };
    let frames = [
        b"garbage".to_vec(),
        vec![],
        vec![1, 0],
        frame(session, ClientBody::Bye),
        frame(session, ClientBody::Start(start)),
        frame(session ^ 1, ClientBody::Release(vec![SlotLease { slot: 0, generation: 1 }])),
    ];
    for bytes in &frames {
        stranger.send(bytes, 0).expect("sends");
    }
    stranger.send_multipart(["too", "many", "parts"], 0).expect("sends");
    // Not a ZeroMQ peer at all.
    let mut raw = UnixStream::connect(host.path("run/data.sock")).expect("connects");
    raw.write_all(&[0xFF; 4096]).expect("writes");
    let mut answer = Vec::new();
    // The daemon hangs up on it, or greets and hangs up.
    let _ = raw.read_to_end(&mut answer);

    let epoch = read_epoch(&mut client, 0);
    assert_eq!(epoch.indices.len(), support::N_SAMPLES);
    let counters = counters(&host);
    assert_eq!(counters["transport_bad_frames"], 4, "{counters}");
    assert_eq!(counters["transport_orphan_frames"], 3, "{counters}");
}

#[test]
fn a_stale_or_invented_release_frees_nothing() {
    let host = Host::new("");
    let _daemon = host.start();
    let slots = wire::StreamRequest { n_slots: 2, ..request(10, "{}") };
    let mut client = host.connect(slots).expect("connects");
    client.start(0, 0, "").expect("starts");
    client.next_event().expect("the epoch begins");
    let first = next_batch(&mut client).expect("a batch");
    let second = next_batch(&mut client).expect("a batch");
    let bytes = (first.pixels().to_vec(), second.pixels().to_vec());
    let lease = SlotLease { slot: first.descriptor.slot, generation: first.descriptor.generation };
    for wrong in [
        SlotLease { generation: lease.generation.wrapping_sub(1), ..lease },
        SlotLease { generation: lease.generation + 1, ..lease },
        SlotLease { slot: 2, ..lease },
        SlotLease { slot: u32::MAX, ..lease },
    ] {
        client.release(wrong).expect("sends");
    }
    // The releases and the question take different ways: the last may come first.
    let began = std::time::Instant::now();
    while counters(&host)["transport_stale_releases"] != 4 {
        assert!(began.elapsed().as_secs() < 30, "{}", counters(&host));
    }
    assert!(first.pixels() == bytes.0 && second.pixels() == bytes.1);
    let (_, stdout, _) = host.ctl(&["--json", "stream", "list"]);
    let streams: Value = serde_json::from_str(&stdout).expect("is JSON");
    let stream = streams.get(0).unwrap_or(&streams["streams"][0]);
    assert_eq!(stream["leased_slots"], 2, "{streams}");
}

#[test]
fn tcp_wants_the_token_and_carries_the_same_bytes() {
    let host = Host::new("[transport]\ntcp = \"127.0.0.1:0\"");
    let daemon = host.start();
    let (_, stdout, _) = host.ctl(&["--json", "status"]);
    let status: Value = serde_json::from_str(&stdout).expect("is JSON");
    let endpoint = status["daemon"]["tcp"].as_str().expect("an endpoint").to_owned();
    let token = std::fs::read_to_string(host.path("state/tcp-token")).expect("a token");
    let context = zmq::Context::new();
    let ask = |token: &str| {
        let socket = context.socket(zmq::DEALER).expect("a socket");
        socket.set_linger(0).expect("sets");
        socket.set_rcvtimeo(30_000).expect("sets");
        socket.connect(&endpoint).expect("connects");
        let hello = ClientHello {
            protocol: PROTOCOL_VERSION,
            client: "test".to_owned(),
            token: token.to_owned(),
            request: request(100, r#"{"dtype": "u8"}"#),
        };
        let frame =
            ClientFrame { protocol: PROTOCOL_VERSION, session: 0, body: ClientBody::Hello(hello) };
        socket.send(wire::encode(&frame).expect("encodes"), 0).expect("sends");
        let answer = socket.recv_bytes(0).expect("an answer");
        let frame: DaemonFrame = wire::decode(&answer).expect("is a frame");
        let DaemonBody::Hello(hello) = frame.body else { panic!("{frame:?}") };
        (socket, hello.reply)
    };
    for wrong in ["", "x", &token.trim()[1..]] {
        let (_, HelloReply::Refused(refusal)) = ask(wrong) else { panic!("let in") };
        assert_eq!(refusal.code, ErrorCode::Forbidden);
        assert!(refusal.hint.contains("token file"), "{refusal:?}");
    }
    let (socket, HelloReply::Welcome(welcome)) = ask(token.trim()) else { panic!("refused") };
    let send = |body| {
        let frame = ClientFrame { protocol: PROTOCOL_VERSION, session: welcome.session, body };
        socket.send(wire::encode(&frame).expect("encodes"), 0).expect("sends");
    };
    send(ClientBody::Start(Start { seek: 1, epoch: 2, offset: 0, policy: String::new() }));
    let mut pixels = Vec::new();
    loop {
        let mut parts = socket.recv_multipart(0).expect("a message");
        let frame: DaemonFrame = wire::decode(&parts.remove(0)).expect("is a frame");
        match frame.body {
            DaemonBody::EpochBegin(_) => {}
            DaemonBody::EpochEnd(_) => break,
            DaemonBody::Batch(batch) => {
                assert!(batch.inline);
                let n_bytes = batch.n_samples as usize * support::SIDE * support::SIDE;
                pixels.extend_from_slice(&parts[0][..n_bytes]);
                let lease = SlotLease { slot: batch.slot, generation: batch.generation };
                send(ClientBody::Release(vec![lease]));
            }
            body => panic!("{body:?}"),
        }
    }
    let mut local = host.connect(request(100, r#"{"dtype": "u8"}"#)).expect("connects");
    assert!(pixels == read_epoch(&mut local, 2).pixels, "TCP and local bytes are the same");
    drop(local);
    assert_eq!(daemon.stop(), 0);
}
