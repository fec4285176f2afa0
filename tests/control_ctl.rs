//! `fastaa-ctl` against a control server over a real policy store, and without a daemon.

#![allow(clippy::unwrap_used, reason = "a helper of a test is a test")]

mod control_harness;

use std::fs;

use control_harness::{TestServer, ctl};
use fastaa::control::ServerOptions;
use fastaa::policy::{self, PolicyStore};
use serde_json::{Value, json};

fn start(datasets: &[&str]) -> TestServer {
    TestServer::start(datasets, ServerOptions::default())
}

/// A policy file in the server's folder.
fn file(server: &TestServer, name: &str, text: &str) -> String {
    let path = server.dir.path().join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn status_is_one_page_and_json() {
    let server = start(&["mnist"]);
    let page = server.ctl(&["status"]).good();
    for expected in [
        "fastaa-loaderd 9.9.9, pid ",
        "up 1 min 1 s, 2 worker threads, built without torch",
        "http 127.0.0.1:9464",
        "mnist  train    60000  28x28x1  10 class  arrow",
        "mnist         0  none             1          -",
        "local pid 77",
        "1/4          -  mnist@1      1234",
        "batches     12",
    ] {
        assert!(page.contains(expected), "'{page}' lacks '{expected}'");
    }
    let pages = server.ctl(&["top", "--pages", "2", "--interval", "0.1"]).good();
    let first_line = page.lines().next().unwrap();
    assert_eq!(pages.matches(&first_line[..20]).count(), 2, "{pages}");
    assert!(!pages.contains('\u{1b}'), "no terminal, no control codes");
    server.ctl(&["top", "--interval", "0"]).check_failed(2, &["between 0.1 and 3600"]);
    let status = server.ctl(&["status", "--json"]).json();
    assert_eq!(status["datasets"][0]["shape"], json!([28, 28, 1]));
    assert_eq!(status["policies"][0]["pinned"], Value::Null);
    assert_eq!(status["counters"]["batches"], 12);
    let streams = server.ctl(&["--json", "stream", "list"]).json();
    assert_eq!(streams, status["streams"]);
    assert!(server.ctl(&["stream", "list"]).good().contains("mnist/train"));
}

#[test]
fn without_a_daemon_builtins_and_files_still_work() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| ctl(dir.path(), args);
    let socket = dir.path().join("control.sock");
    let socket = socket.to_str().unwrap();
    for args in [
        &["status"][..],
        &["policy", "show"],
        &["policy", "list"],
        &["policy", "publish", "trivial-wide"],
        &["policy", "pin", "mnist@1"],
        &["policy", "export", "mnist@1"],
        &["stream", "list"],
    ] {
        let hint = "hint: start one: fastaa-loaderd --config FILE";
        run(args).check_failed(69, &["error: no daemon answers on ", socket, hint]);
    }
    let shown = run(&["policy", "show", "autoaugment-cifar10"]).good();
    for expected in
        ["profile     torchvision", "draws       1", "Invert p=0.10, then Contrast p=0.20"]
    {
        assert!(shown.contains(expected), "'{shown}' lacks '{expected}'");
    }
    let shown = run(&["policy", "show", "none", "--json"]).json();
    assert_eq!(shown["id"], policy::none().id().to_string());
    assert_eq!((&shown["version"], &shown["dataset"]), (&json!(0), &Value::Null));

    let path = dir.path().join("out.json");
    let path = path.to_str().unwrap();
    run(&["policy", "export", "randaugment(2,9)", "-o", path]).good();
    assert_eq!(policy::load_reference(path).unwrap(), policy::randaugment(2, 9).unwrap());
    assert_eq!(run(&["policy", "show", path, "--json"]).json()["version"], 0);
    let diff = run(&["policy", "diff", path, "trivial-wide", "--json"]).json();
    assert_eq!(diff["draws"], json!([2, 1]));
    assert_eq!(diff["ops_profile"], json!(["torchvision", "trivial-wide"]));
    let diff = run(&["policy", "diff", path, "randaugment(2,9)"]).good();
    assert_eq!(diff, "no difference: 14 sub-policies in both\n");
    let list = "[[[\"Rotate\",0.5,0.25]]]\n";
    fs::write(path, list).unwrap();
    assert_eq!(run(&["policy", "export", path, "--format", "list"]).good(), list);
    run(&["policy", "export", "trivial-wide", "--format", "list"])
        .check_failed(1, &["cannot express the profile trivial-wide"]);
    run(&["policy", "show", "trivialwide"]).check_failed(1, &["did you mean 'trivial-wide'?"]);
    run(&["policy", "show", "a/b.json"]).check_failed(1, &["a/b.json: No such file"]);
    run(&["policy", "frobnicate"]).check_failed(2, &["unrecognized subcommand"]);
    run(&["policy", "diff", "none"]).check_failed(2, &["required arguments"]);
    let long = dir.path().join("x".repeat(80));
    ctl(&long, &["status"]).check_failed(2, &["choose a shorter folder"]);
}

#[test]
fn policies_are_published_pinned_and_rolled_back() {
    let server = start(&["mnist"]);
    let run = |args: &[&str]| server.ctl(args);
    let first = file(&server, "first.json", "[[[\"Rotate\",0.5,0.25]]]");
    let second = file(&server, "second.json", "p = [[[\"Invert\",1,0]],[[\"Color\",0.5,0.5]]]");
    let published = run(&["policy", "publish", &first]).good();
    assert_eq!(published, "mnist@1: published and active from the next epoch\n");
    let again = run(&["policy", "publish", &first]).good();
    assert_eq!(again, "mnist@1: active already, with the same content\n");
    let json = run(&["policy", "publish", &second, "--dataset", "mnist", "--json"]).json();
    assert_eq!((&json["version"], &json["is_new"]), (&json!(2), &json!(true)));

    let shown = run(&["policy", "show"]).good();
    assert!(shown.starts_with("mnist@2 (active)\nname        second\n"), "{shown}");
    assert!(shown.contains("evidence    {\"file\":\""), "{shown}");
    assert!(shown.contains("1  50.00 %  Invert p=1.00\n"), "{shown}");
    assert_eq!(run(&["policy", "show", "mnist@1", "--json"]).json()["policy"]["name"], "first");
    let diff = run(&["policy", "diff", "mnist@1", "active"]).good();
    assert!(diff.contains("1 removed, 2 added, 0 reweighted, 0 unchanged"), "{diff}");
    let exported = run(&["policy", "export", "mnist@2", "--format", "list"]).good();
    assert_eq!(exported, "[[[\"Invert\",1.0,0.0]],[[\"Color\",0.5,0.5]]]\n");

    let pinned = "mnist@1: active from the next epoch, pinned\n";
    assert_eq!(run(&["policy", "pin", "mnist@1"]).good(), pinned);
    run(&["policy", "publish", "trivial-wide"]).good();
    run(&["policy", "rollback"]).check_failed(1, &["pinned at version 1; unpin it first"]);
    let list = run(&["policy", "list"]).good();
    assert!(list.starts_with("mnist: pinned at version 1\n"), "{list}");
    let starred = list.lines().find(|line| line.starts_with('*')).unwrap();
    assert!(starred.contains(" 1  ") && starred.ends_with("first"), "{list}");
    assert_eq!(
        run(&["policy", "list", "--json"]).json()[0]["versions"].as_array().unwrap().len(),
        4
    );
    assert_eq!(run(&["policy", "unpin"]).good(), "mnist@3: active from the next epoch\n");
    run(&["policy", "unpin"]).check_failed(1, &["no pinned policy"]);
    assert_eq!(run(&["policy", "rollback", "--json"]).json()["active_version"], 1);
    for (reference, version) in [("2", 2), ("none", 0), ("mnist@active", 0), ("mnist@3", 3)] {
        let head = run(&["policy", "pin", reference, "--json"]).json();
        assert_eq!(head["pinned"], version, "{reference}");
    }
    run(&["policy", "pin", "mnist@9"]).check_failed(1, &["the newest version of 'mnist' is 3"]);
    run(&["policy", "pin", "trivial-wide"])
        .check_failed(1, &["is no version in the store", "hint: publish it first"]);
}

#[test]
fn bad_policies_are_refused_before_the_daemon_sees_them() {
    let server = start(&["mnist"]);
    for (text, expected) in [
        ("", "empty; a policy file holds"),
        ("[[[\"Rotat\",0.5,0.5]]]", "unknown operation 'Rotat'; did you mean 'Rotate'?"),
        ("[[[\"Rotate\",2,0.5]]]", "sub-policy 1, op 1 ('Rotate'): probability 2 is not"),
    ] {
        let path = file(&server, "bad.json", text);
        server.ctl(&["policy", "publish", &path]).check_failed(1, &[&path, expected]);
    }
    assert_eq!(server.ctl(&["policy", "list", "--json"]).json()[0]["active_version"], 0);
}

#[test]
fn datasets_are_named_where_there_are_several() {
    let server = start(&["mnist", "cifar"]);
    let run = |args: &[&str]| server.ctl(args);
    for args in [
        &["policy", "show"][..],
        &["policy", "publish", "trivial-wide"],
        &["policy", "pin", "1"],
        &["policy", "unpin"],
        &["policy", "rollback"],
    ] {
        let hint = "hint: add --dataset, one of: mnist, cifar";
        run(args).check_failed(1, &["the daemon has several datasets", hint]);
    }
    run(&["policy", "publish", "trivial-wide", "--dataset", "cifar"]).good();
    let shown = run(&["policy", "show", "--dataset", "cifar", "--json"]).json();
    assert_eq!(shown["reference"], "cifar@1");
    assert_eq!(run(&["policy", "show", "cifar@active", "--json"]).json()["version"], 1);
    assert_eq!(run(&["policy", "show", "mnist@0", "--json"]).json()["is_active"], true);
    assert_eq!(run(&["policy", "list", "--json"]).json().as_array().unwrap().len(), 2);
    let one = run(&["policy", "list", "--dataset", "mnist", "--json"]).json();
    assert_eq!(one.as_array().unwrap().len(), 1);
    run(&["policy", "show", "--dataset", "cfiar"])
        .check_failed(1, &["there is no dataset 'cfiar'", "hint: did you mean 'cifar'?"]);
    run(&["policy", "show", "mnst@1"]).check_failed(1, &["hint: did you mean 'mnist'?"]);
    run(&["policy", "pin", "cifar@1", "--dataset", "mnist"])
        .check_failed(1, &["is a version of 'cifar', not of 'mnist'"]);
}

#[test]
fn a_damaged_version_is_named_and_the_rest_goes_on() {
    let server = start(&["mnist"]);
    let run = |args: &[&str]| server.ctl(args);
    run(&["policy", "publish", "trivial-wide"]).good();
    run(&["policy", "publish", "randaugment(2,9)"]).good();
    let lineage = server.dir.path().join("policies/mnist");
    fs::write(lineage.join("000002.json"), "{").unwrap();
    run(&["policy", "show"]).check_failed(1, &["000002.json is damaged"]);
    let list = run(&["policy", "list"]).good();
    assert!(list.contains("000002.json is damaged") && list.contains("trivial-wide"), "{list}");
    assert!(run(&["status"]).good().contains("000002.json is damaged"));
    run(&["policy", "rollback"]).good();
    assert_eq!(run(&["policy", "show", "--json"]).json()["reference"], "mnist@1");
    fs::write(lineage.join("active.json"), "").unwrap();
    run(&["policy", "show"]).check_failed(1, &["active.json is damaged"]);
    assert_eq!(run(&["policy", "show", "mnist@1", "--json"]).json()["version"], 1);
    assert!(run(&["policy", "list"]).good().contains("active.json is damaged"));
}

#[test]
fn the_server_reads_no_files_for_its_peers() {
    let server = start(&["mnist"]);
    let path = file(&server, "secret.json", "[[[\"Rotate\",0.5,0.25]]]");
    let request = fastaa::control::Request::PolicyShow { reference: path, dataset: None };
    let error = server.client().call(&request).unwrap_err().to_string();
    assert!(error.contains("is no built-in policy and no NAME@VERSION"), "{error}");
    let store = PolicyStore::open(server.dir.path().join("policies")).unwrap();
    assert_eq!(store.active("mnist").unwrap().version, 0);
}
