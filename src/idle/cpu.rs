//! How busy the processors are without the search: `/proc/stat`, and the kernel's pressure where it
//! has it.
//!
//! Owns reading and differencing of the two. Decides nothing.
//!
//! *Source*: proc(5), `/proc/stat` and `/proc/PID/stat`; Linux, Documentation/accounting/psi.rst.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// A shorter time is too few ticks of 10 ms to say how busy a core was.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// What the processors did between two looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CpuSample {
    /// Processors that the daemon may use.
    pub n_cores: f64,
    /// Cores that others than the search kept busy.
    pub busy_others: f64,
    /// Share of the time in which a task that wanted a core had none, 0..=1; `None` where the
    /// kernel does not say, and while the search itself may be what waits.
    pub pressure: Option<f64>,
}

/// Counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    /// Busy time of all processors, in clock ticks.
    busy: u64,
    /// Of that, the search's.
    own: u64,
    /// Time in which a task waited, in microseconds.
    waited: Option<u64>,
}

/// Reads the counters. See the module.
#[derive(Debug)]
pub struct CpuWatch {
    proc_dir: PathBuf,
    n_cores: f64,
    ticks_per_second: f64,
    before: Option<(Duration, Option<u32>, Counters)>,
    /// The search computed at some time since `before`.
    has_run: bool,
    last: Option<CpuSample>,
}

impl CpuWatch {
    /// On the kernel's files below `proc_dir`, usually `/proc`.
    pub fn new(proc_dir: &Path) -> Self {
        let n_cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            proc_dir: proc_dir.to_owned(),
            n_cores: n_cores as f64,
            ticks_per_second: rustix::param::clock_ticks_per_second() as f64,
            before: None,
            has_run: false,
            last: None,
        }
    }

    /// What happened since the last look, or what that look gave if it was just now: whoever is
    /// woken often looks often. `None` at the first one, after one that failed, and where
    /// there is no `/proc/stat`. `search` is the search's process, `is_running` whether it computed
    /// at any time since the last look.
    pub fn look(
        &mut self,
        now: Duration,
        search: Option<u32>,
        is_running: bool,
    ) -> Option<CpuSample> {
        self.has_run |= is_running;
        let is_just_now = |(then, ..): &(Duration, Option<u32>, Counters)| {
            now.saturating_sub(*then) < INTERVAL_MIN
        };
        if self.before.as_ref().is_some_and(is_just_now) {
            return self.last;
        }
        let is_running = std::mem::take(&mut self.has_run);
        self.last = self.sample(now, search, is_running);
        self.last
    }

    fn sample(
        &mut self,
        now: Duration,
        search: Option<u32>,
        is_running: bool,
    ) -> Option<CpuSample> {
        let counters = self.counters(search);
        let before = self.before.take();
        self.before = counters.map(|counters| (now, search, counters));
        let (then, whose, before) = before?;
        let counters = counters?;
        let seconds = now.checked_sub(then)?.as_secs_f64();
        if seconds <= 0.0 {
            return None;
        }
        // A process that is new since then spent all its time since then.
        let own_before = if whose == search { before.own } else { 0 };
        let own = counters.own.saturating_sub(own_before);
        let busy = counters.busy.saturating_sub(before.busy).saturating_sub(own);
        let waited = counters.waited.zip(before.waited).filter(|_| !is_running);
        Some(CpuSample {
            n_cores: self.n_cores,
            busy_others: busy as f64 / self.ticks_per_second / seconds,
            pressure: waited.map(|(now, before)| {
                (now.saturating_sub(before) as f64 / 1e6 / seconds).clamp(0.0, 1.0)
            }),
        })
    }

    fn counters(&self, search: Option<u32>) -> Option<Counters> {
        let read = |name: &str| std::fs::read_to_string(self.proc_dir.join(name)).ok();
        let own = search.and_then(|pid| read(&format!("{pid}/stat")));
        Some(Counters {
            busy: busy_ticks(&read("stat")?)?,
            own: own.and_then(|text| process_ticks(&text)).unwrap_or(0),
            waited: read("pressure/cpu").and_then(|text| waited_micros(&text)),
        })
    }
}

/// Busy ticks of all processors, from the first line of `/proc/stat`: user, nice, system, irq,
/// softirq, steal. Guests are in user and nice already.
fn busy_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let at = |idx: usize| fields.get(idx).copied().unwrap_or(0);
    (fields.len() >= 4).then(|| at(0) + at(1) + at(2) + at(5) + at(6) + at(7))
}

/// User and system ticks of a process, fields 14 and 15 of `/proc/PID/stat`. The name before them
/// may hold spaces and brackets.
fn process_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// The total of the line `some` in `/proc/pressure/cpu`, in microseconds.
fn waited_micros(pressure: &str) -> Option<u64> {
    let line = pressure.lines().find_map(|line| line.strip_prefix("some "))?;
    line.split_whitespace().find_map(|field| field.strip_prefix("total=")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  100 20 30 4000 500 6 7 8 90 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n";

    #[test]
    fn the_kernel_s_files_are_read() {
        assert_eq!(busy_ticks(STAT), Some(100 + 20 + 30 + 6 + 7 + 8));
        assert_eq!(busy_ticks("cpu  1 2 3 4\n"), Some(6), "an old kernel");
        assert_eq!(busy_ticks("intr 5\n"), None);
        let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 77 23 0 0 39 19 1 0\n";
        assert_eq!(process_ticks(stat), Some(100));
        assert_eq!(process_ticks("42 (a"), None);
        let pressure = "some avg10=1.37 avg60=9.39 avg300=40.11 total=625453853\n\
                        full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(waited_micros(pressure), Some(625_453_853));
        assert_eq!(waited_micros(""), None);
    }

    fn write(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn the_search_is_not_counted_among_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = CpuWatch::new(folder.path());
        watch.ticks_per_second = 100.0;
        let second = Duration::from_secs(1);
        assert_eq!(watch.look(second, None, false), None, "no files");
        let process = |ticks: u64| format!("9 (x) S 1 2 3 4 5 6 7 8 9 10 {ticks} 0 0\n");
        write(folder.path(), "stat", "cpu  100 0 0 0\n");
        write(folder.path(), "9/stat", &process(50));
        write(folder.path(), "pressure/cpu", "some avg10=0 total=1000000\n");
        assert_eq!(watch.look(second, Some(9), true), None, "the first look");
        write(folder.path(), "stat", "cpu  400 0 0 0\n");
        write(folder.path(), "9/stat", &process(250));
        write(folder.path(), "pressure/cpu", "some avg10=0 total=1500000\n");
        let sample = watch.look(3 * second, Some(9), true).unwrap();
        assert!((sample.busy_others - 0.5).abs() < 1e-9, "{sample:?}");
        assert_eq!(sample.pressure, None, "the search itself may have waited");
        write(folder.path(), "pressure/cpu", "some avg10=0 total=1700000\n");
        let sample = watch.look(4 * second, Some(9), false).unwrap();
        assert!((sample.pressure.unwrap() - 0.2).abs() < 1e-9, "{sample:?}");
        let again = watch.look(4 * second + INTERVAL_MIN / 2, Some(9), true);
        assert_eq!(again, Some(sample), "too few ticks for a look of its own");
        write(folder.path(), "stat", "cpu  430 0 0 0\n");
        write(folder.path(), "8/stat", &process(30));
        let sample = watch.look(5 * second, Some(8), false).unwrap();
        assert!(sample.busy_others.abs() < 1e-9, "a new search's time is its own: {sample:?}");
        assert_eq!(sample.pressure, None, "it ran between the looks");
    }
}
