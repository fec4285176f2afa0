//! When a run that follows `active` switches its policy.
//!
//! Owns one pure rule. Never reads the store, a clock or a pin: `provider` brings what it needs.
//!
//! A person's publish, pin and rollback reach a run at its next epoch. What the search published
//! reaches it more slowly: training settles on one distribution before it meets another, and it
//! ends on the one that it settled on.

use std::collections::BTreeMap;

/// How fast the search's versions reach a run; from `[search]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct SwitchRules {
    /// A run switches at most once per so many epochs; 0 and 1: at each.
    pub(super) min_epochs_between: u64,
    /// Share of a run's epochs, at its end, without a switch, in [0, 1].
    pub(super) freeze_last: f64,
}

/// What `active` means now.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ActiveNow {
    /// Names exactly one policy.
    pub(super) reference: String,
    /// It is active because the search published it; a person did nothing about it since.
    pub(super) is_by_search: bool,
}

/// The reference that `epoch` of a run gets.
///
/// `history` has the references of the run's earlier epochs (later ones don't count);
/// `total_epochs` is the run's length, 0 if it is not known. A run's first epoch gets what is
/// active, and is no switch.
pub(super) fn decide(
    history: &BTreeMap<u64, String>,
    epoch: u64,
    total_epochs: u64,
    rules: SwitchRules,
    active: &ActiveNow,
) -> String {
    let earlier = || history.range(..epoch).rev();
    let Some((_, current)) = earlier().next() else { return active.reference.clone() };
    if !active.is_by_search || *current == active.reference {
        return active.reference.clone();
    }
    if is_frozen(epoch, total_epochs, rules.freeze_last) {
        return current.clone();
    }
    // The first epoch of the stretch under the current policy, if another one was before it.
    let mut switched = None;
    let mut first = epoch;
    for (at, reference) in earlier() {
        if reference != current {
            switched = Some(first);
            break;
        }
        first = *at;
    }
    match switched {
        Some(switched) if epoch - switched < rules.min_epochs_between => current.clone(),
        _ => active.reference.clone(),
    }
}

/// Whether `epoch` is one of the last `share` of `total_epochs`, rounded up to whole epochs.
fn is_frozen(epoch: u64, total_epochs: u64, share: f64) -> bool {
    // 0.07 of 100 epochs are 7, although the product is 7.000000000000001.
    #[allow(clippy::cast_possible_truncation, reason = "a float cast saturates")]
    let n_frozen = (share * total_epochs as f64 - 1e-9).ceil() as u64;
    total_epochs > 0 && epoch >= total_epochs.saturating_sub(n_frozen)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: SwitchRules = SwitchRules { min_epochs_between: 3, freeze_last: 0.1 };

    fn by_search(reference: &str) -> ActiveNow {
        ActiveNow { reference: reference.to_owned(), is_by_search: true }
    }

    fn by_a_person(reference: &str) -> ActiveNow {
        ActiveNow { reference: reference.to_owned(), is_by_search: false }
    }

    fn history(references: &[&str]) -> BTreeMap<u64, String> {
        (0..).zip(references.iter().map(|reference| (*reference).to_owned())).collect()
    }

    /// Runs a whole training: what is active in each epoch → what each epoch got.
    fn run(active: &[ActiveNow], total_epochs: u64, rules: SwitchRules) -> Vec<String> {
        let mut pins = BTreeMap::new();
        for (epoch, active) in (0..).zip(active) {
            let decided = decide(&pins, epoch, total_epochs, rules, active);
            pins.insert(epoch, decided);
        }
        pins.into_values().collect()
    }

    #[test]
    fn a_run_begins_with_what_is_active_and_may_switch_at_once() {
        assert_eq!(decide(&BTreeMap::new(), 7, 0, RULES, &by_search("d@1")), "d@1");
        assert_eq!(decide(&history(&["none"]), 1, 0, RULES, &by_search("d@1")), "d@1");
        // A run that is resumed in its last epochs begins with what is active, too.
        assert_eq!(decide(&BTreeMap::new(), 99, 100, RULES, &by_search("d@1")), "d@1");
    }

    #[test]
    fn versions_of_the_search_come_at_most_once_per_so_many_epochs() {
        let active: Vec<_> = (1..=9).map(|version| by_search(&format!("d@{version}"))).collect();
        let got = run(&active, 0, RULES);
        assert_eq!(got, ["d@1", "d@2", "d@2", "d@2", "d@5", "d@5", "d@5", "d@8", "d@8"]);
        for fast in [0, 1] {
            let rules = SwitchRules { min_epochs_between: fast, ..RULES };
            let expected: Vec<_> = active.iter().map(|now| now.reference.clone()).collect();
            assert_eq!(run(&active, 0, rules), expected);
        }
    }

    #[test]
    fn what_a_person_does_comes_at_the_next_epoch_and_counts_as_a_switch() {
        let pins = history(&["d@1", "d@2"]);
        assert_eq!(decide(&pins, 2, 0, RULES, &by_search("d@3")), "d@2");
        assert_eq!(decide(&pins, 2, 0, RULES, &by_a_person("d@1")), "d@1");
        assert_eq!(decide(&pins, 2, 3, RULES, &by_a_person("d@1")), "d@1", "frozen or not");
        let pins = history(&["d@1", "d@2", "d@1"]);
        assert_eq!(decide(&pins, 4, 0, RULES, &by_search("d@3")), "d@1");
        assert_eq!(decide(&pins, 5, 0, RULES, &by_search("d@3")), "d@3");
    }

    #[test]
    fn the_last_epochs_keep_their_policy() {
        let pins = history(&["d@1"; 100]);
        for (total_epochs, epoch, is_kept) in [
            (100, 89, false),
            (100, 90, true),
            (100, 99, true),
            // Longer than it said: still at its end.
            (100, 100, true),
            (0, 99, false),
            // Rounded up: one epoch of five.
            (5, 3, false),
            (5, 4, true),
            (1000, 99, false),
        ] {
            let got = decide(&pins, epoch, total_epochs, RULES, &by_search("d@2"));
            assert_eq!(got, if is_kept { "d@1" } else { "d@2" }, "{epoch} of {total_epochs}");
        }
        let odd = SwitchRules { freeze_last: 0.07, ..RULES };
        assert_eq!(decide(&pins, 92, 100, odd, &by_search("d@2")), "d@2");
        assert_eq!(decide(&pins, 93, 100, odd, &by_search("d@2")), "d@1");
        let all = SwitchRules { freeze_last: 1.0, ..RULES };
        assert_eq!(decide(&pins, 1, 10, all, &by_search("d@2")), "d@1");
        let none = SwitchRules { freeze_last: 0.0, ..RULES };
        assert_eq!(decide(&pins, 9, 10, none, &by_search("d@2")), "d@2");
    }

    #[test]
    fn gaps_and_later_epochs_do_not_matter() {
        let pins: BTreeMap<u64, String> =
            [(0, "d@1"), (4, "d@2"), (20, "d@9")].map(|(at, name)| (at, name.to_owned())).into();
        assert_eq!(decide(&pins, 6, 0, RULES, &by_search("d@3")), "d@2");
        assert_eq!(decide(&pins, 7, 0, RULES, &by_search("d@3")), "d@3");
        assert_eq!(decide(&pins, 6, 0, RULES, &by_search("d@2")), "d@2");
    }
}
