//! The second half of a recipe by libtorch, in memory that is lent.
//!
//! *Justification of `unsafe`*: the bytes lie in slots on a GPU, which libtorch must read and write
//! without a copy. The borrower promises that they are there and left alone ([`FinishPlace`]).

use std::sync::{Mutex, PoisonError};

use tch::{Cuda, Device, Kind, TchError, Tensor};

use crate::augment::PreparedPolicy;
use crate::gpu::{FinishPlace, Where};
use crate::tensor::{Finish, augment, load_cuda};

use super::on_device::FinishOnDevice;
use super::recipe::{Dtype, Layout};
use super::render::{CompiledRecipe, SampleKey};

/// See the module.
#[derive(Debug)]
pub struct TensorFinish {
    recipe: CompiledRecipe,
    seed: u64,
    /// Made at the first batch, on its device.
    ready: Mutex<Option<(Device, Finish)>>,
}

impl TensorFinish {
    /// Of the whole recipe of a stream with `seed`.
    pub fn new(recipe: CompiledRecipe, seed: u64) -> Self {
        Self { recipe, seed, ready: Mutex::default() }
    }

    fn run(
        &self,
        policy: &PreparedPolicy,
        epoch: u64,
        samples: &[i64],
        place: FinishPlace,
    ) -> Result<(), TchError> {
        let device = device_of(place.at)?;
        let shape = self.recipe.shape();
        let mut steps = Vec::with_capacity(samples.len() * shape.views);
        for mark in samples {
            // What was skipped has draws as well, of which nobody will see anything.
            let sample_idx = if *mark < 0 { -1 - mark } else { *mark }.unsigned_abs();
            let key = SampleKey { seed: self.seed, epoch, sample_idx };
            steps.extend(
                (0..shape.views as u64).map(|view| self.recipe.steps(policy, key.of_view(view))),
            );
        }
        let sizes = [steps.len(), shape.channels, shape.height, shape.width];
        let images = borrow(place.source, sizes, Kind::Uint8, device);
        let images = augment(&images, &steps)?;
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let known = ready.take().filter(|(known, _)| *known == device);
        let (_, finish) = ready.insert(match known {
            Some(known) => known,
            None => (device, self.values(device)?),
        });
        let sizes = match shape.layout {
            Layout::Nchw => sizes,
            Layout::Nhwc => [steps.len(), shape.height, shape.width, shape.channels],
        };
        borrow(place.target, sizes, self.kind(), device).f_copy_(&finish.run(&images)?)?;
        Ok(())
    }

    fn values(&self, device: Device) -> Result<Finish, TchError> {
        let channels_last = self.recipe.shape().layout == Layout::Nhwc;
        Finish::new(&self.recipe.values(), self.kind(), channels_last, device)
    }

    fn kind(&self) -> Kind {
        match self.recipe.shape().dtype {
            Dtype::U8 => Kind::Uint8,
            Dtype::F16 => Kind::Half,
            Dtype::Bf16 => Kind::BFloat16,
            Dtype::F32 => Kind::Float,
        }
    }
}

impl FinishOnDevice for TensorFinish {
    fn whole(&self) -> &CompiledRecipe {
        &self.recipe
    }

    fn finish(
        &self,
        policy: &PreparedPolicy,
        epoch: u64,
        samples: &[i64],
        place: FinishPlace,
    ) -> Result<(), String> {
        tch::no_grad(|| self.run(policy, epoch, samples, place)).map_err(|error| {
            // A trace of C++ calls follows.
            let text = error.to_string();
            format!("libtorch: {}", text.lines().next().unwrap_or_default())
        })
    }
}

fn device_of(at: Where) -> Result<Device, TchError> {
    let Where::Gpu(ordinal) = at else { return Ok(Device::Cpu) };
    load_cuda().map_err(TchError::FileFormat)?;
    if !Cuda::is_available() {
        return Err(TchError::FileFormat("libtorch finds no GPU that it can use".to_owned()));
    }
    Ok(Device::Cuda(ordinal))
}

/// A contiguous tensor of somebody else's memory.
fn borrow(address: usize, sizes: [usize; 4], kind: Kind, device: Device) -> Tensor {
    let sizes = sizes.map(|size| i64::try_from(size).expect("sizes of a batch"));
    let strides = [sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1];
    let data = std::ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: the place holds as many values of this kind as the sizes say (the slot was laid out
    // for this very shape), and is nobody else's until the queued work is over: the tensor does not
    // outlive the call that queues it.
    #[allow(unsafe_code, reason = "see the module's justification")]
    unsafe {
        Tensor::from_blob(data, &sizes, &strides, kind, device)
    }
}
