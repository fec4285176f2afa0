//! What was seen of the GPU that the search may use. Plain data.
//!
//! Owns the vocabulary between whoever samples a GPU and the decision. Samples nothing itself.

/// A process with memory or work on the GPU, other than the search and the daemon.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuProcess {
    /// As the driver numbers it: the host's number, also for a process in a container.
    pub pid: u32,
    /// Share of the last sampling time in which a kernel of it ran, 0..=1; `None` where the driver
    /// does not say it by process.
    pub utilisation: Option<f64>,
}

/// How a GPU is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// As a whole, in time slices.
    Whole,
    /// It is cut into instances (MIG), each of which is used for itself.
    Mig,
    /// Processes run side by side through a server (MPS), which hides them from one another.
    Mps,
}

/// One look at a GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuSample {
    /// Share of the last sampling time in which any kernel ran, the search's among them, 0..=1.
    pub utilisation: f64,
    /// The same for the search's own process; `None` if the driver can't tell it from others.
    pub own_utilisation: Option<f64>,
    /// Share of the multiprocessors that were busy (GPM, from Hopper on), 0..=1, everybody's.
    pub multiprocessors: Option<f64>,
    /// Other processes on it.
    pub others: Vec<GpuProcess>,
    /// How it is shared out.
    pub sharing: Sharing,
    /// Memory that is free, in bytes.
    pub memory_free: u64,
    /// All its memory, in bytes.
    pub memory_total: u64,
}

/// What is known of the GPU that the search may use.
#[derive(Clone, Debug, PartialEq)]
pub enum Gpu {
    /// The search computes on the processors.
    None,
    /// It was there, and no longer answers; in the words of the driver.
    Lost(String),
    /// The driver refuses to tell what is needed; in its words.
    Blind(String),
    /// As it was at the last look.
    Seen(GpuSample),
}
