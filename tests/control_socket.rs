//! The control socket: good requests, and that no peer can harm the daemon.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a helper of a test is a test")]

mod control_harness;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use control_harness::{Ran, TestServer};
use fastaa::control::{
    ControlClient, ControlClientError, ControlServer, FailureCode, Reply, ReplyLine, Request,
    RuntimePaths, ServerOptions,
};
use fastaa::{limits, policy};
use serde_json::{Value, json};

fn start(datasets: &[&str]) -> TestServer {
    TestServer::start(datasets, ServerOptions::default())
}

fn raw(server: &TestServer) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(server.paths.control_socket()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    BufReader::new(stream)
}

fn send(stream: &mut BufReader<UnixStream>, bytes: &[u8]) {
    stream.get_mut().write_all(bytes).unwrap();
}

fn receive(stream: &mut BufReader<UnixStream>) -> ReplyLine {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn check_failure(reply: ReplyLine, code: FailureCode, expected: &str) {
    let ReplyLine::Error(failure) = reply else { panic!("{reply:?}") };
    assert_eq!(failure.code, code, "{failure:?}");
    assert!(failure.message.contains(expected), "{failure:?} lacks '{expected}'");
}

#[test]
fn a_connection_carries_requests_one_after_the_other() {
    let server = start(&["mnist"]);
    let mut client = server.client();
    let Reply::Status(status) = client.call(&Request::Status).unwrap() else { panic!() };
    assert_eq!(status.daemon.pid, std::process::id());
    assert_eq!((status.policies[0].name.as_str(), status.policies[0].active_version), ("none", 0));
    let policy = policy::to_value(&policy::trivial_wide());
    let publish = Request::PolicyPublish { dataset: None, policy, evidence: json!({"n": 1}) };
    let Reply::PolicyPublished(published) = client.call(&publish).unwrap() else { panic!() };
    assert_eq!((published.version, published.is_new, published.is_active), (1, true, true));
    let show = Request::PolicyShow { reference: "active".to_owned(), dataset: None };
    let Reply::PolicyVersion(shown) = client.call(&show).unwrap() else { panic!() };
    assert_eq!((shown.reference.as_str(), shown.is_active), ("mnist@1", true));
    assert_eq!(shown.evidence, json!({"n": 1}));
    assert_eq!(policy::from_value(&shown.policy, "x").unwrap(), policy::trivial_wide());
    let Reply::Status(status) = client.call(&Request::Status).unwrap() else { panic!() };
    assert_eq!(status.policies[0].active_version, 1);
}

#[test]
fn two_requests_in_one_write_get_two_replies_in_order() {
    let server = start(&["mnist"]);
    let mut stream = raw(&server);
    send(&mut stream, b"{\"request\":\"stream-list\"}\n{\"request\":\"dataset-list\"}");
    stream.get_ref().shutdown(Shutdown::Write).unwrap();
    assert!(matches!(receive(&mut stream), ReplyLine::Ok(Reply::Streams { .. })));
    assert!(matches!(receive(&mut stream), ReplyLine::Ok(Reply::Datasets { .. })));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the server closes after the peer's end");
}

#[test]
fn garbage_gets_an_error_reply_and_the_connection_goes_on() {
    let server = start(&["mnist"]);
    let mut stream = raw(&server);
    let deep =
        [&b"{\"request\":\"policy-publish\",\"policy\":"[..], &b"[".repeat(100_000)].concat();
    for (line, expected) in [
        (&b""[..], "not a request: EOF"),
        (b"\0\xff\xfe garbage", "not a request: expected value"),
        (b"\"\xff\"", "not a request: "),
        (b"42", "not a request: "),
        (b"[]", "not a request: "),
        (b"{}", "missing field `request`"),
        (b"{\"request\":\"stats\"}", "unknown variant `stats`, expected one of `status`"),
        (b"{\"request\":\"policy-pin\"}", "missing field `reference`"),
        (b"{\"request\":\"policy-show\",\"reference\":7}", "expected a string"),
        (b"{\"request\":\"status\"} x", "trailing characters"),
        (&b"[".repeat(100_000), "not a request: "),
        (&deep, "recursion limit exceeded"),
    ] {
        send(&mut stream, line);
        send(&mut stream, b"\n");
        check_failure(receive(&mut stream), FailureCode::Invalid, expected);
    }
    send(&mut stream, b"{\"request\":\"status\",\"a newer field\":1}\n");
    assert!(matches!(receive(&mut stream), ReplyLine::Ok(Reply::Status(_))));
    drop(stream);
    let mut half = raw(&server);
    send(&mut half, b"{\"request\":");
    drop(half);
    server.client().call(&Request::Status).unwrap();
}

#[test]
fn an_oversize_line_is_refused_before_it_is_held() {
    let server = start(&["mnist"]);
    let evidence = Value::from("x".repeat(2 * limits::CONTROL_BYTES_MAX));
    let policy = policy::to_value(&policy::trivial_wide());
    let publish = Request::PolicyPublish { dataset: None, policy, evidence };
    let error = server.client().call(&publish).unwrap_err();
    let ControlClientError::Failure(failure) = error else { panic!("{error}") };
    assert_eq!(failure.code, FailureCode::Invalid);
    assert_eq!(failure.message, "a request has at most 16777216 bytes");
    let mut client = server.client();
    let Reply::Status(status) = client.call(&Request::Status).unwrap() else { panic!() };
    assert_eq!(status.policies[0].active_version, 0);
}

#[test]
fn a_panic_over_a_request_is_an_internal_failure() {
    let server = start(&["mnist"]);
    let mut client = server.client();
    let digest = |dataset: &str| Request::ExpectedDigest {
        dataset: dataset.to_owned(),
        split: "train".to_owned(),
        seed: 0,
        epoch: 0,
        batch_size: 1,
        world_size: 1,
        rank: 0,
        drop_last: false,
        shuffle: true,
        start_offset: 0,
    };
    for (dataset, expected) in [("panic", FailureCode::Internal), ("other", FailureCode::NotFound)]
    {
        let error = client.call(&digest(dataset)).unwrap_err();
        let ControlClientError::Failure(failure) = error else { panic!("{error}") };
        assert_eq!(failure.code, expected);
    }
}

#[test]
fn connections_are_bounded_and_free_again_when_closed() {
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let server = TestServer::start(&["mnist"], options);
    let mut first = server.client();
    let mut second = server.client();
    first.call(&Request::Status).unwrap();
    second.call(&Request::Status).unwrap();
    let error = server.client().call(&Request::Status).unwrap_err();
    let ControlClientError::Failure(failure) = error else { panic!("{error}") };
    assert_eq!(failure.code, FailureCode::Exhausted);
    drop(first);
    let deadline = Instant::now() + Duration::from_secs(20);
    while server.client().call(&Request::Status).is_err() {
        assert!(Instant::now() < deadline, "a closed connection was never freed");
    }
    second.call(&Request::Status).unwrap();
}

#[test]
fn a_silent_peer_is_hung_up() {
    let idle_timeout = Duration::from_millis(30);
    let server =
        TestServer::start(&["mnist"], ServerOptions { idle_timeout, ..ServerOptions::default() });
    let mut stream = raw(&server);
    send(&mut stream, b"{\"request\":");
    let before = Instant::now();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    assert!(before.elapsed() < Duration::from_secs(10));
}

#[test]
fn stopping_closes_connections_and_removes_the_socket() {
    let mut server = start(&["mnist"]);
    let mut stream = raw(&server);
    send(&mut stream, b"{\"request\":\"status\"}\n");
    receive(&mut stream);
    server.stop();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!(!server.paths.control_socket().exists());
    let error = ControlClient::connect(&server.paths).unwrap_err();
    assert!(matches!(error, ControlClientError::NoDaemon { .. }), "{error}");
    assert_eq!(error.hint(), "start one: fastaa-loaderd --config FILE");
}

#[test]
fn a_dead_daemons_socket_is_replaced_but_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let paths = RuntimePaths::new(dir.path()).unwrap();
    let path = paths.control_socket();
    drop(ControlServer::bind(&path, ServerOptions::default()).unwrap());
    assert!(path.exists(), "a dead daemon leaves its socket");
    let error = ControlClient::connect(&paths).unwrap_err();
    assert!(matches!(error, ControlClientError::NoDaemon { .. }), "{error}");
    let options = ServerOptions { mode: 0o600, ..ServerOptions::default() };
    let server = ControlServer::bind(&path, options).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(server);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let error = ControlServer::bind(&path, ServerOptions::default()).unwrap_err().to_string();
    assert!(error.ends_with("is there and is no socket; remove it"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

const NOBODY: u32 = 65_534;

/// `fastaa-ctl status` as another user, from a copy that this user can reach.
fn status_as_nobody(server: &TestServer) -> Ran {
    let program = server.dir.path().join("fastaa-ctl");
    fs::copy(env!("CARGO_BIN_EXE_fastaa-ctl"), &program).unwrap();
    fs::set_permissions(server.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    Command::new(program)
        .arg("--runtime-dir")
        .arg(server.paths.dir())
        .args(["status", "--json"])
        .current_dir("/")
        .gid(NOBODY)
        .uid(NOBODY)
        .output()
        .unwrap()
        .into()
}

#[test]
fn other_users_are_refused_unless_allowed() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let open = || ServerOptions { mode: 0o666, ..ServerOptions::default() };
    let server = TestServer::start(&["mnist"], open());
    let expected = ["error: user 65534 may not control this daemon", "hint: run it as root"];
    status_as_nobody(&server).check_failed(1, &expected);
    server.client().call(&Request::Status).unwrap();

    let server =
        TestServer::start(&["mnist"], ServerOptions { allowed_uids: vec![NOBODY], ..open() });
    assert_eq!(status_as_nobody(&server).json()["daemon"]["version"], "9.9.9");

    let server = start(&["mnist"]);
    status_as_nobody(&server).check_failed(1, &["this user may not connect to ", "hint: "]);
}
