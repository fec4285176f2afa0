//! What is checked and decided of a request before its stream exists: ranges, sizes, secrets.
//!
//! Owns the limits' messages. Knows no session.

use crate::limits::{
    BATCH_SIZE_MAX, NAME_BYTES_MAX, SLAB_BYTES_MAX, SLOTS_MAX, SLOTS_MIN, WORLD_SIZE_MAX,
};

use super::wire::{ErrorCode, Refusal, StreamRequest};

/// A slab is made about this large if the client does not say how many slots it wants.
const SLAB_BYTES_TARGET: usize = 64 * 1024 * 1024;
/// Slots when a batch is large.
const SLOTS_DEFAULT_MIN: usize = 3;
/// Slots when a batch is small.
const SLOTS_DEFAULT_MAX: usize = 8;

/// Checks what can be checked of a request without its dataset.
///
/// # Errors
/// The first value that is out of range.
pub(super) fn check_request(request: &StreamRequest) -> Result<(), Refusal> {
    let invalid = |message: String, hint: &str| {
        Err(Refusal::new(ErrorCode::Invalid, message).with_hint(hint))
    };
    let StreamRequest { batch_size, world_size, rank, n_slots, .. } = *request;
    if batch_size == 0 || batch_size > BATCH_SIZE_MAX {
        return invalid(
            format!("batch_size {batch_size} is not between 1 and {BATCH_SIZE_MAX}"),
            "choose how many samples this rank takes per step",
        );
    }
    if world_size == 0 || world_size > WORLD_SIZE_MAX {
        return invalid(
            format!("world_size {world_size} is not between 1 and {WORLD_SIZE_MAX}"),
            "world_size is the number of ranks that share the epoch",
        );
    }
    if rank >= world_size {
        return invalid(
            format!("rank {rank} is not below world_size {world_size}"),
            "ranks count from 0",
        );
    }
    if n_slots != 0 && !(SLOTS_MIN..=SLOTS_MAX).contains(&n_slots) {
        return invalid(
            format!("n_slots {n_slots} is not between {SLOTS_MIN} and {SLOTS_MAX}"),
            "0 lets the daemon choose",
        );
    }
    for (what, name) in
        [("dataset", &request.dataset), ("split", &request.split), ("group", &request.group)]
    {
        if name.len() > NAME_BYTES_MAX {
            return invalid(
                format!("the {what}'s name is {} bytes long", name.len()),
                &format!("at most {NAME_BYTES_MAX} bytes"),
            );
        }
    }
    Ok(())
}

/// Slots of a session's slab.
///
/// # Errors
/// They would be too large together.
pub(super) fn n_slots(request: &StreamRequest, slot_bytes: usize) -> Result<u32, Refusal> {
    let n_slots = match request.n_slots {
        0 => {
            let fitting = SLAB_BYTES_TARGET / slot_bytes.max(1);
            let clamped = fitting.clamp(SLOTS_DEFAULT_MIN, SLOTS_DEFAULT_MAX);
            u32::try_from(clamped).expect("at most SLOTS_DEFAULT_MAX")
        }
        n_slots => n_slots,
    };
    if slot_bytes as u64 * u64::from(n_slots) > SLAB_BYTES_MAX {
        return Err(too_large(request));
    }
    Ok(n_slots)
}

/// Why no slab can be made.
pub(super) fn too_large(request: &StreamRequest) -> Refusal {
    Refusal::new(
        ErrorCode::Invalid,
        format!(
            "batches of {} samples need more than {SLAB_BYTES_MAX} bytes of shared memory",
            request.batch_size
        ),
    )
    .with_hint("choose a smaller batch_size or n_slots")
}

/// Random bytes of the system.
///
/// # Errors
/// It has none.
pub(super) fn fill_random(bytes: &mut [u8]) -> Result<(), Refusal> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
                .map_err(|error| {
                    Refusal::new(ErrorCode::Internal, format!("no random numbers: {error}"))
                })?;
    }
    Ok(())
}

/// Compares without telling by its duration where two tokens differ.
pub(super) fn equal_in_constant_time(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |sum, (x, y)| sum | (x ^ y));
    a.len() == b.len() && std::hint::black_box(differences) == 0
}
