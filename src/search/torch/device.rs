//! Where fold models compute: on the processors, or on one GPU.
//!
//! Chooses no GPU among several: `CUDA_VISIBLE_DEVICES` does, and the first one of it is used.
//!
//! On a GPU, a *unit* is what is queued between two waits for the device: one training step, or the
//! judging of some images. A process that is stopped leaves at most that much behind.

use std::path::Path;
use std::time::{Duration, Instant};

use tch::{Cuda, Device};

use super::{Precision, TorchError};
use crate::search::gpu_clock;
use crate::tensor::load_cuda;

/// What an NVIDIA driver shows: Linux, and Linux inside Windows.
const DRIVER_FILES: [&str; 3] = ["/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg"];

/// What fold models compute on. Part of what a result depends on: two kinds round differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Processor {
    /// The processors, one thread per model.
    #[default]
    Cpu,
    /// The first GPU that CUDA shows.
    Cuda,
}

impl Processor {
    /// `cpu` or `cuda`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// In which numbers built-in models compute there.
    pub fn precision(self) -> Precision {
        Precision::fastest(self.device())
    }

    pub(super) const fn device(self) -> Device {
        match self {
            Self::Cpu => Device::Cpu,
            Self::Cuda => Device::Cuda(0),
        }
    }

    /// The GPU, after libtorch's CUDA part is loaded and told to compute the same twice.
    ///
    /// # Errors
    /// libtorch has no CUDA part, or finds no GPU that it can use.
    pub fn gpu() -> Result<Self, TorchError> {
        let refused = |problem: String| TorchError::Cuda { problem };
        load_cuda().map_err(refused)?;
        if !Cuda::is_available() {
            return Err(refused(
                "libtorch finds no GPU (no driver, one that is too old, or none in \
                 CUDA_VISIBLE_DEVICES)"
                    .to_owned(),
            ));
        }
        Ok(Self::Cuda)
    }

    /// The GPU if there is one, else the processors. A GPU that is there but cannot be used is an
    /// error that the caller may tell; without a driver nothing is loaded.
    ///
    /// # Errors
    /// As [`Self::gpu`].
    pub fn best() -> Result<Self, TorchError> {
        let is_hidden = std::env::var("CUDA_VISIBLE_DEVICES").is_ok_and(|list| list.is_empty());
        let has_driver = DRIVER_FILES.iter().any(|file| Path::new(file).exists());
        if is_hidden || !has_driver { Ok(Self::Cpu) } else { Self::gpu() }
    }
}

/// Runs a unit that waits for the device by reading its result, and counts its time if the device
/// is a GPU. `is_warm`: not one of the first, which load kernels.
pub(super) fn unit<T>(
    device: Device,
    is_warm: bool,
    work: impl FnOnce() -> Result<T, TorchError>,
) -> Result<T, TorchError> {
    if !device.is_cuda() {
        return work();
    }
    let began = Instant::now();
    let result = work();
    let elapsed: Duration = began.elapsed();
    gpu_clock::count(elapsed, is_warm);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::CUDA_LIBRARY;

    /// Without a GPU, loading must still work where libtorch has a CUDA part, and say why not where
    /// it has none; with one, it is found.
    #[test]
    fn the_gpu_is_found_or_refused_in_words() {
        match Processor::gpu() {
            Ok(found) => assert_eq!(found, Processor::Cuda),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("search.device = \"cpu\""), "{text}");
                assert!(text.contains("no GPU") || text.contains(CUDA_LIBRARY), "{text}");
            }
        }
    }

    #[test]
    fn time_on_processors_is_not_a_gpu_s() {
        let before = gpu_clock::thread_seconds();
        unit(Device::Cpu, true, || Ok(())).expect("does nothing");
        assert!(gpu_clock::thread_seconds() <= before);
        assert_eq!((Processor::Cpu.name(), Processor::Cuda.name()), ("cpu", "cuda"));
    }
}
