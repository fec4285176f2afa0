//! Proposals are the same in every process: a search that was killed goes on as if it had not been.

use fastaa::random::mix64;
use fastaa::search::proposer::{Proposer, RandomSearch, Tpe, TpeSettings};
use fastaa::search::space::{Point, PolicySpace};
use sha2::{Digest, Sha256};

/// Proposals after a made-up history, as a hash of their JSON.
fn fingerprint(space: &PolicySpace) -> String {
    let random = RandomSearch::new(space.space().clone(), 3);
    let mut history: Vec<(Point, f64)> = Vec::new();
    for trial in 0..60 {
        let loss = f64::from(u32::try_from(mix64(trial) >> 40).expect("24 bits"));
        history.push((random.propose(&[], trial), loss));
    }
    let tpe = Tpe::new(space.space().clone(), 3, TpeSettings::POLICIES).expect("good settings");
    let mut hash = Sha256::new();
    for trial in 60..70 {
        let point = tpe.propose(&history, trial);
        hash.update(serde_json::to_vec(&point).expect("is JSON"));
    }
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn proposals_are_the_same_in_every_process() {
    let spaces = [PolicySpace::sub_policy(), PolicySpace::folded(), PolicySpace::paper()];
    let found = spaces.each_ref().map(fingerprint);
    assert_eq!(found, ["65c7ab9675fbcd86", "437c8b647e7f7ec4", "a135b936fcd3c254"]);
}
