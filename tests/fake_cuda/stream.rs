//! A stream of the played GPU: a thread that does what it is given in order, and late.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};

use super::Event;

/// What it is given.
pub(crate) enum Work {
    Copy { target: usize, source: usize, n_bytes: usize },
    Pass { event: Event, record: u64 },
    Say(Sender<()>),
}

fn delay() -> Duration {
    let given = std::env::var("FAKE_CUDA_DELAY_US").ok().and_then(|text| text.parse().ok());
    Duration::from_micros(given.unwrap_or(300))
}

pub(crate) fn start_stream() -> Sender<Work> {
    let (sender, works) = bounded(1 << 16);
    let work = move || {
        for work in works {
            match work {
                Work::Copy { target, source, n_bytes } => {
                    std::thread::sleep(delay());
                    let target = std::ptr::with_exposed_provenance_mut::<u8>(target);
                    let source = std::ptr::with_exposed_provenance::<u8>(source);
                    unsafe { std::ptr::copy_nonoverlapping(source, target, n_bytes) };
                }
                Work::Pass { event, record } => {
                    event.counter(1).fetch_max(record, Ordering::AcqRel);
                }
                Work::Say(sender) => sender.send(()).expect("somebody waits"),
            }
        }
    };
    std::thread::Builder::new().name("played-stream".into()).spawn(work).expect("a thread");
    sender
}
