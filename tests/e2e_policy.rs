//! Policies reach running streams: at the next epoch, the same for all of a group, and after a
//! restart still the one that an epoch began with.

mod support;

use fastaa::transport::client::ClientEvent;
use fastaa::transport::wire::StreamRequest;
use serde_json::Value;
use support::{Host, next_batch, read_epoch, request};

const INVERT: &str = r#"{"name": "inverted", "ops_profile": "fastaa", "sub_policies":
    [{"weight": 1, "ops": [["Invert", 1.0, 0.0]]}]}"#;
const SOLARIZE: &str = r#"{"name": "solarised", "ops_profile": "fastaa", "sub_policies":
    [{"weight": 1, "ops": [["Solarize", 1.0, 0.5]]}]}"#;
const BYTES: &str = r#"{"dtype": "u8"}"#;

fn publish(host: &Host, name: &str, policy: &str) -> Value {
    let path = host.path(name);
    std::fs::write(&path, policy).expect("writes the policy");
    let path = path.display().to_string();
    let (code, stdout, stderr) = host.ctl(&["--json", "policy", "publish", &path]);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).expect("is JSON")
}

#[test]
fn a_published_policy_goes_live_at_the_next_epoch_and_every_batch_names_its_policy() {
    let host = Host::new("");
    let _daemon = host.start();
    let mut client = host.connect(request(100, BYTES)).expect("connects");
    let plain = read_epoch(&mut client, 0);
    assert_eq!((plain.begin.policy.as_str(), plain.begin.policy_version), ("none", 0));

    // In the middle of epoch 1.
    client.start(1, 0, "").expect("starts");
    assert!(matches!(client.next_event(), Ok(ClientEvent::Begin(_))));
    let first = next_batch(&mut client).expect("a batch");
    let published = publish(&host, "invert.json", INVERT);
    assert_eq!(published["version"], 1);
    let mut n_old = 0;
    while let Some(batch) = next_batch(&mut client) {
        assert_eq!(batch.descriptor.policy_id, first.descriptor.policy_id);
        assert_eq!(batch.descriptor.policy_version, 0);
        n_old += 1;
    }
    assert_eq!(n_old, 9, "the epoch under way kept its policy to its end");
    drop(first);

    let inverted = read_epoch(&mut client, 2);
    assert_eq!(inverted.begin.policy, "digits@1");
    assert_eq!(inverted.begin.policy_version, 1);
    let id: String = inverted.begin.policy_id.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(published["id"], id.as_str());
    let again = {
        let none = r#"{"dtype": "u8", "policy": "none"}"#;
        read_epoch(&mut host.connect(request(100, none)).expect("connects"), 2)
    };
    let complement: Vec<u8> = again.pixels.iter().map(|byte| 255 - byte).collect();
    assert!(inverted.pixels == complement, "the pixels are the policy's");

    // What ctl says is what the batches say.
    let (code, stdout, stderr) = host.ctl(&["--json", "policy", "show", "active"]);
    assert_eq!(code, 0, "{stderr}");
    let shown: Value = serde_json::from_str(&stdout).expect("is JSON");
    assert_eq!((&shown["version"], &shown["id"]), (&published["version"], &published["id"]));
}

#[test]
fn pin_unpin_and_rollback_choose_what_the_next_epoch_gets() {
    let host = Host::new("");
    let _daemon = host.start();
    let mut client = host.connect(request(500, BYTES)).expect("connects");
    let mut epoch = 0;
    let mut next_policy = |host: &Host, args: &[&str]| {
        let (code, _, stderr) = host.ctl(args);
        assert_eq!(code, 0, "{args:?}: {stderr}");
        epoch += 1;
        read_epoch(&mut client, epoch).begin.policy
    };
    publish(&host, "a.json", INVERT);
    publish(&host, "b.json", SOLARIZE);
    assert_eq!(next_policy(&host, &["policy", "list"]), "digits@2");
    assert_eq!(next_policy(&host, &["policy", "pin", "digits@1"]), "digits@1");
    publish(&host, "c.json", &SOLARIZE.replace("0.5", "0.25"));
    assert_eq!(next_policy(&host, &["policy", "list"]), "digits@1");
    assert_eq!(next_policy(&host, &["policy", "unpin"]), "digits@3");
    // The version that was live before: the pinned one.
    assert_eq!(next_policy(&host, &["policy", "rollback"]), "digits@1");
}

#[test]
fn the_members_of_a_group_agree_on_an_epoch_s_policy_even_after_a_restart() {
    let host = Host::new("");
    let daemon = host.start();
    let member = |rank| StreamRequest {
        rank,
        world_size: 2,
        group: "run-7".to_owned(),
        ..request(100, BYTES)
    };
    let mut rank_0 = host.connect(member(0)).expect("connects");
    assert_eq!(read_epoch(&mut rank_0, 4).begin.policy, "none");
    publish(&host, "a.json", INVERT);
    // Rank 1 is late: the policy has changed since rank 0 began the epoch.
    let mut rank_1 = host.connect(member(1)).expect("connects");
    assert_eq!(read_epoch(&mut rank_1, 4).begin.policy, "none");
    assert_eq!(read_epoch(&mut rank_1, 5).begin.policy, "digits@1");
    drop((rank_0, rank_1));
    daemon.kill();

    let _daemon = host.start();
    let mut rank_0 = host.connect(member(0)).expect("connects");
    assert_eq!(read_epoch(&mut rank_0, 4).begin.policy, "none");
    assert_eq!(read_epoch(&mut rank_0, 5).begin.policy, "digits@1");
    let mut alone = host.connect(request(100, BYTES)).expect("connects");
    assert_eq!(read_epoch(&mut alone, 4).begin.policy, "digits@1");
}

#[test]
fn a_resumed_epoch_goes_on_with_the_policy_it_began_with() {
    let host = Host::new("");
    let daemon = host.start();
    publish(&host, "a.json", INVERT);
    publish(&host, "b.json", SOLARIZE);
    daemon.kill();
    let _daemon = host.start();
    let mut client = host.connect(request(100, BYTES)).expect("connects");
    client.start(3, 300, "digits@1").expect("starts");
    let Ok(ClientEvent::Begin(begin)) = client.next_event() else { panic!("the epoch begins") };
    assert_eq!(begin.policy, "digits@1");
    let mut n_batches = 0;
    while let Some(batch) = next_batch(&mut client) {
        assert_eq!(batch.descriptor.policy_id, begin.policy_id);
        n_batches += 1;
    }
    assert_eq!(n_batches, 7);
}

#[test]
fn an_epoch_keeps_the_content_of_a_policy_file_that_is_edited() {
    let host = Host::new("");
    let daemon = host.start();
    let path = host.path("mine.json");
    std::fs::write(&path, INVERT).expect("writes the policy");
    let recipe = format!(r#"{{"dtype": "u8", "policy": "{}"}}"#, path.display());
    let member = |rank| StreamRequest {
        rank,
        world_size: 2,
        group: "edited".to_owned(),
        ..request(100, &recipe)
    };
    let first = read_epoch(&mut host.connect(member(0)).expect("connects"), 0).begin;
    assert!(first.policy.starts_with("id:"), "{}", first.policy);
    std::fs::write(&path, SOLARIZE).expect("edits the policy");
    // Another rank, and after a restart, in the same epoch: the old content. Next epoch: the new.
    let mut late = host.connect(member(1)).expect("connects");
    assert_eq!(read_epoch(&mut late, 0).begin.policy_id, first.policy_id);
    assert_ne!(read_epoch(&mut late, 1).begin.policy_id, first.policy_id);
    drop(late);
    daemon.kill();
    let _daemon = host.start();
    let mut again = host.connect(member(0)).expect("connects");
    assert_eq!(read_epoch(&mut again, 0).begin.policy_id, first.policy_id);
    // Without a group, the state says what the epoch began with.
    let mut alone = host.connect(request(100, &recipe)).expect("connects");
    alone.start(0, 500, &first.policy).expect("starts");
    let Ok(ClientEvent::Begin(begin)) = alone.next_event() else { panic!("the epoch begins") };
    assert_eq!(begin.policy_id, first.policy_id);
}
