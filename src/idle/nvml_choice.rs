//! Which GPU the search may use. Pure.
//!
//! Owns the meaning of `idle.gpu` and `CUDA_VISIBLE_DEVICES`. Knows no driver.
//!
//! *Source*: NVIDIA, CUDA C++ Programming Guide, "CUDA Environment Variables": a list of indices or
//! of UUIDs (or beginnings of them); what comes after the first invalid entry is not visible.

/// What the choice came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The device with this index.
    One(usize),
    /// None; the text says why.
    None(String),
}

/// Chooses among devices with these UUIDs: the wanted one, or the visible one with the fewest
/// users.
pub fn choose(
    uuids: &[&str],
    wanted: Option<&str>,
    visible: Option<&str>,
    n_users: impl Fn(usize) -> usize,
) -> Choice {
    if uuids.is_empty() {
        return Choice::None("NVML knows no GPU".to_owned());
    }
    let visible = visible.map_or_else(|| (0..uuids.len()).collect(), |list| listed(uuids, list));
    if let Some(wanted) = wanted {
        return match find(uuids, wanted) {
            Some(idx) if visible.contains(&idx) => Choice::One(idx),
            Some(_) => {
                Choice::None(format!("idle.gpu = \"{wanted}\" is not in CUDA_VISIBLE_DEVICES"))
            }
            None => Choice::None(format!(
                "idle.gpu = \"{wanted}\" is none of the {} GPUs: {}",
                uuids.len(),
                uuids.join(", ")
            )),
        };
    }
    // The first of several: `min_by_key` keeps it.
    match visible.into_iter().min_by_key(|&idx| n_users(idx)) {
        Some(idx) => Choice::One(idx),
        None => Choice::None("CUDA_VISIBLE_DEVICES shows no GPU".to_owned()),
    }
}

/// The devices of a list, up to its first entry that is none.
fn listed(uuids: &[&str], list: &str) -> Vec<usize> {
    list.split(',').map_while(|entry| find(uuids, entry.trim())).collect()
}

fn find(uuids: &[&str], name: &str) -> Option<usize> {
    if let Ok(idx) = name.parse::<usize>() {
        return (idx < uuids.len()).then_some(idx);
    }
    if name.len() < "GPU-".len() {
        return None;
    }
    let mut found = uuids.iter().enumerate().filter(|(_, uuid)| uuid.starts_with(name));
    match (found.next(), found.next()) {
        (Some((idx, _)), None) => Some(idx),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUIDS: [&str; 3] = ["GPU-aa11", "GPU-aa22", "GPU-bb33"];

    fn none_users(_: usize) -> usize {
        0
    }

    #[test]
    fn the_wanted_one_is_found_by_index_and_by_uuid() {
        for (wanted, idx) in [("0", 0), ("2", 2), ("GPU-aa22", 1), ("GPU-b", 2)] {
            let found = choose(&UUIDS, Some(wanted), None, none_users);
            assert_eq!(found, Choice::One(idx), "{wanted}");
        }
        for (wanted, words) in [
            ("3", "idle.gpu = \"3\" is none of the 3 GPUs: GPU-aa11, GPU-aa22, GPU-bb33"),
            ("GPU-a", "idle.gpu = \"GPU-a\" is none of the 3 GPUs: GPU-aa11, GPU-aa22, GPU-bb33"),
        ] {
            let found = choose(&UUIDS, Some(wanted), None, none_users);
            assert_eq!(found, Choice::None(words.to_owned()));
        }
    }

    #[test]
    fn only_visible_ones_are_used() {
        let found = choose(&UUIDS, None, Some("2,GPU-aa22"), |idx| [0, 4, 9][idx]);
        assert_eq!(found, Choice::One(1), "the one with fewer users of the two");
        let found = choose(&UUIDS, None, Some("2,-1,0"), |idx| [0, 4, 9][idx]);
        assert_eq!(found, Choice::One(2), "what is after an invalid entry is hidden");
        let hidden = Choice::None("CUDA_VISIBLE_DEVICES shows no GPU".to_owned());
        for list in ["", "-1", "NoDevFiles", "7"] {
            assert_eq!(choose(&UUIDS, None, Some(list), none_users), hidden, "{list}");
        }
        let found = choose(&UUIDS, Some("1"), Some("0"), none_users);
        let words = "idle.gpu = \"1\" is not in CUDA_VISIBLE_DEVICES";
        assert_eq!(found, Choice::None(words.to_owned()));
    }

    #[test]
    fn the_emptiest_is_taken_and_the_first_of_equals() {
        assert_eq!(choose(&UUIDS, None, None, |idx| [2, 1, 1][idx]), Choice::One(1));
        assert_eq!(choose(&UUIDS, None, None, none_users), Choice::One(0));
        let none = Choice::None("NVML knows no GPU".to_owned());
        assert_eq!(choose(&[], None, None, none_users), none);
    }
}
