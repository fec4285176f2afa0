//! Reading ahead: tells the system which samples come next while datasets are not in memory.
//!
//! The order of an epoch is known, and jobs are given out several batches before workers come to
//! them. So for every job a thread of its own passes the samples on to [`Split::will_need`], and
//! the disk reads many of them at once, while each worker would wait for one at a time.
//!
//! Where all is in memory, hints would cost system calls and bring nothing: they are given only
//! while the process reads from disks at all, as the system counts it.
//!
//! Never changes what a batch is, never makes a submitter wait: hints that find no room are
//! dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::order::EpochOrder;
use super::workers::StreamSpec;

/// Jobs whose hints wait for the thread; further ones are dropped.
const JOBS_MAX: usize = 256;
/// How often the process's reading is looked at: a look costs some 10 µs.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Samples that will be read soon.
pub(super) struct Soon {
    pub(super) spec: Arc<StreamSpec>,
    pub(super) order: Arc<EpochOrder>,
    pub(super) first_position: u64,
    pub(super) n_samples: u64,
}

/// The thread that gives hints. Dropping it ends it.
pub(super) struct Ahead {
    jobs: Option<Sender<Soon>>,
    thread: Option<JoinHandle<()>>,
    is_over: Arc<AtomicBool>,
    /// The process reads from disks, or did when it was last looked at.
    is_reading: bool,
    looked: Instant,
    /// What had been read from disks then; `None` where the system does not count it.
    read_bytes: Option<u64>,
}

impl Ahead {
    /// Starts the thread. What has never been read is taken to be on disk.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(super) fn start() -> std::io::Result<Self> {
        let (sender, jobs) = bounded(JOBS_MAX);
        let is_over = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&is_over);
        let thread = std::thread::Builder::new()
            .name("read-ahead".to_owned())
            .spawn(move || give_hints(&jobs, &flag))?;
        Ok(Self {
            jobs: Some(sender),
            thread: Some(thread),
            is_over,
            is_reading: true,
            looked: Instant::now(),
            read_bytes: read_from_disks(),
        })
    }

    /// Gives hints for samples that were just given out to workers, if there is reason to.
    pub(super) fn offer(&mut self, soon: impl FnOnce() -> Soon) {
        if self.looked.elapsed() >= LOOK_EVERY {
            let now = read_from_disks();
            self.is_reading = now.is_none() || now != self.read_bytes;
            self.read_bytes = now;
            self.looked = Instant::now();
        }
        if let Some(jobs) = self.jobs.as_ref().filter(|_| self.is_reading) {
            // Without room the disk is behind already.
            let _ = jobs.try_send(soon());
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn give_hints(jobs: &Receiver<Soon>, is_over: &AtomicBool) {
    while let Ok(Soon { spec, order, first_position, n_samples }) = jobs.recv() {
        for position in first_position..first_position + n_samples {
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            spec.split.will_need(order.sample_at(position));
        }
    }
}

/// Bytes that this process has caused to be read from disks.
///
/// *Source*: `proc_pid_io(5)`, `read_bytes`: what missed the system's cache, for files and maps
/// alike.
fn read_from_disks() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/io").ok()?;
    text.lines().find_map(|line| line.strip_prefix("read_bytes: ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::dataset::{
        DatasetError, Fingerprint, ImageKind, Label, LabelKind, Sample, Split, SplitInfo,
    };
    use crate::image::decode::DecodeLimits;
    use crate::pipeline::recipe::{OnError, Recipe};
    use crate::pipeline::render::CompiledRecipe;

    /// Passes on what it is told.
    #[derive(Debug)]
    struct Told(SplitInfo, Sender<u64>);

    impl Split for Told {
        fn info(&self) -> &SplitInfo {
            &self.0
        }

        fn sample<'a>(&'a self, _: u64, _: &'a mut Vec<u8>) -> Result<Sample<'a>, DatasetError> {
            unreachable!("hints do not read samples")
        }

        fn label(&self, _: u64) -> Result<Label<'_>, DatasetError> {
            unreachable!("hints do not read labels")
        }

        fn will_need(&self, sample_idx: u64) {
            let _ = self.1.try_send(sample_idx);
        }
    }

    fn spec() -> (Receiver<u64>, Arc<StreamSpec>) {
        let info = SplitInfo {
            format: "told",
            n_samples: 100,
            images: ImageKind::Raw { width: 1, height: 1, channels: 1 },
            label_kind: LabelKind::Class { n_classes: 1 },
            class_names: vec![],
            fingerprint: Fingerprint("0".to_owned()),
            mapped_bytes: 0,
        };
        let recipe = CompiledRecipe::new(&Recipe::default(), &info, DecodeLimits::default());
        let (sender, told) = bounded(1000);
        let spec = StreamSpec {
            split: Arc::new(Told(info, sender)),
            recipe: recipe.unwrap(),
            seed: 0,
            shuffle: true,
            shared: None,
            on_error: OnError::Fail,
            bad_samples: None,
        };
        (told, Arc::new(spec))
    }

    #[test]
    fn hints_come_in_the_order_of_the_epoch_until_nothing_is_read_from_disks() {
        let (told, spec) = spec();
        let order = Arc::new(EpochOrder::new(100, 7, 3, true));
        let soon = |first_position, n_samples| {
            let (spec, order) = (Arc::clone(&spec), Arc::clone(&order));
            Soon { spec, order, first_position, n_samples }
        };
        let mut ahead = Ahead::start().unwrap();
        ahead.offer(|| soon(10, 3));
        ahead.offer(|| soon(13, 2));
        for position in 10..15 {
            let found = told.recv_timeout(Duration::from_secs(20)).unwrap();
            assert_eq!(found, order.sample_at(position));
        }

        // Nothing is read from here on but, maybe, pages of this program.
        let n_looks = (0..1000).find(|_| {
            ahead.looked -= LOOK_EVERY;
            let mut is_offered = false;
            ahead.offer(|| {
                is_offered = true;
                soon(0, 0)
            });
            !is_offered
        });
        assert!(n_looks.is_some(), "hints never end");
    }

    #[test]
    fn a_thread_with_much_to_say_ends_at_once() {
        let (told, spec) = spec();
        let order = Arc::new(EpochOrder::new(100, 7, 3, false));
        let mut ahead = Ahead::start().unwrap();
        let n_samples = u64::MAX;
        ahead.offer(|| Soon { spec, order, first_position: 0, n_samples });
        drop(ahead);
        let n_told = told.len() as u64;
        assert!(told.try_iter().eq(0..n_told));
    }
}
