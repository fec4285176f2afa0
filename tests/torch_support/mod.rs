//! Which device the tensor path's tests compute on.

use fastaa::search::torch::Processor;
use tch::Device;

/// The processors; with `FASTAA_TEST_DEVICE=cuda` the first GPU (`make test-gpu`).
///
/// # Panics
/// A GPU is wanted, and there is none.
pub(crate) fn test_device() -> Device {
    match std::env::var("FASTAA_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            Processor::gpu().expect("FASTAA_TEST_DEVICE=cuda needs a GPU");
            Device::Cuda(0)
        }
        Ok(other) => panic!("FASTAA_TEST_DEVICE={other}: cuda is the only one beside the default"),
        Err(_) => Device::Cpu,
    }
}
