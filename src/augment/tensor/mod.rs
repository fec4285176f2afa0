//! Augmentation of whole batches by libtorch, on its CPU or on a GPU: the twin of
//! [`Canvas`](super::augment::Canvas).
//!
//! Every image of a batch has operations of its own. They are done step by step: in each step the
//! images that need the same kind of operation are taken out, go through it together, each with
//! its own magnitude, and are put back.
//!
//! *Exactness*: 0 differing bytes for every operation, by construction on every device. What is not
//! whole numbers is single additions, multiplications and divisions of f32 and f64, each a kernel
//! of its own, so that nothing can be contracted; IEEE 754 says what they give. Tables that depend
//! on a magnitude alone are the CPU path's own. `tests/tensor_ops.rs` compares both.
//!
//! Owns nothing of policies and random words, chooses no device: it computes where its input lies.

mod color;
mod cuda;
mod geometry;
mod hue;
mod table;

use tch::{Device, Kind, TchError, Tensor};

use crate::augment::{Action, CUTOUT_FILL_GRAY, CUTOUT_FILL_RGB, Step};
use crate::image::draw::PixelBox;
use crate::image::sources::Sources;

pub use cuda::{CUDA_LIBRARY, load_cuda};
pub use geometry::gather;
pub use table::Finish;

/// Images of one step that need the same kind of operation: their places in the batch, and what
/// differs between them.
#[derive(Debug)]
struct Group<T> {
    places: Vec<i64>,
    values: Vec<T>,
}

impl<T> Default for Group<T> {
    fn default() -> Self {
        Self { places: Vec::new(), values: Vec::new() }
    }
}

impl<T> Group<T> {
    fn push(&mut self, place: usize, value: T) {
        self.places.push(i64::try_from(place).expect("a place in a batch"));
        self.values.push(value);
    }

    /// Puts what `make` makes of the group's images in their places.
    fn run(
        &self,
        images: &mut Tensor,
        make: impl FnOnce(&Tensor, &[T]) -> Result<Tensor, TchError>,
    ) -> Result<(), TchError> {
        if self.places.is_empty() {
            return Ok(());
        }
        let places = Tensor::f_from_slice(&self.places)?.f_to_device(images.device())?;
        let made = make(&images.f_index_select(0, &places)?, &self.values)?;
        *images = images.f_index_copy(0, &places, &made)?;
        Ok(())
    }
}

/// The images of one step, sorted by what they need.
#[derive(Default)]
struct Groups {
    point: Group<table::Point>,
    color: Group<f32>,
    sharpness: Group<f32>,
    hue: Group<u8>,
    moved: Group<Sources>,
    filled: Group<(PixelBox, [u8; 3])>,
}

impl Groups {
    fn push(&mut self, place: usize, step: &Step, shape: Shape) {
        let action = match *step {
            Step::Fill(area, fill) => return self.filled.push(place, (area, fill)),
            Step::Hue(shift) => return self.hue.push(place, shift),
            Step::Act(action) => action,
        };
        match action {
            Action::Identity => {}
            Action::Affine(matrix) => {
                self.moved.push(place, Sources::of_affine(&matrix, shape.size()));
            }
            Action::Rotate(degrees) => {
                self.moved.push(place, Sources::of_rotation(degrees, shape.size()));
            }
            Action::Color(factor) => self.color.push(place, factor),
            Action::Sharpness(factor) => self.sharpness.push(place, factor),
            Action::Cutout(area) => {
                let is_gray = shape.channels == 1;
                let fill = if is_gray { [CUTOUT_FILL_GRAY; 3] } else { CUTOUT_FILL_RGB };
                self.filled.push(place, (area, fill));
            }
            Action::AutoContrast
            | Action::Invert
            | Action::Equalize
            | Action::Solarize(_)
            | Action::Posterize(_)
            | Action::Contrast(_)
            | Action::Brightness(_) => self.point.push(place, table::Point::of(action)),
        }
    }
}

/// Shape of a batch: `[n, channels, height, width]`.
#[derive(Clone, Copy, Debug)]
struct Shape {
    n: i64,
    channels: i64,
    height: i64,
    width: i64,
}

impl Shape {
    fn of(images: &Tensor) -> Result<Self, TchError> {
        let (n, channels, height, width) = images.size4()?;
        Ok(Self { n, channels, height, width })
    }

    /// Columns and rows.
    fn size(self) -> (usize, usize) {
        let side = |side: i64| usize::try_from(side).expect("not negative");
        (side(self.width), side(self.height))
    }

    fn n_pixels(self) -> i64 {
        self.height * self.width
    }
}

/// Does to image i of `images` (u8, `[n, channels, height, width]`, 1 or 3 channels) what
/// `steps[i]` says, in order. `images` itself is not changed.
///
/// # Errors
/// libtorch has no memory left, or another shape was given.
pub fn augment(images: &Tensor, steps: &[Vec<Step>]) -> Result<Tensor, TchError> {
    let shape = Shape::of(images)?;
    let mut images = images.shallow_clone();
    if shape.n == 0 || shape.n_pixels() == 0 {
        return Ok(images);
    }
    for at in 0..steps.iter().map(Vec::len).max().unwrap_or(0) {
        let mut groups = Groups::default();
        for (place, own) in steps.iter().enumerate() {
            if let Some(step) = own.get(at) {
                groups.push(place, step, shape);
            }
        }
        groups.point.run(&mut images, table::apply_points)?;
        groups.color.run(&mut images, color::color)?;
        groups.sharpness.run(&mut images, color::sharpness)?;
        groups.hue.run(&mut images, hue::shift_hue)?;
        groups.moved.run(&mut images, |images, sources| gather(images, sources, shape.size()))?;
        groups.filled.run(&mut images, geometry::fill)?;
    }
    Ok(images)
}

/// One value per image, in the shape `[n, 1, 1, 1]`.
fn per_image(values: &[f32], device: Device) -> Result<Tensor, TchError> {
    let n = i64::try_from(values.len()).expect("a batch");
    Tensor::f_from_slice(values)?.f_to_device(device)?.f_view([n, 1, 1, 1])
}

/// Cut to whole numbers and clipped to a byte, as `value as u8` does.
fn to_bytes(values: &Tensor) -> Result<Tensor, TchError> {
    values.f_clamp(0, 255)?.f_to_kind(Kind::Uint8)
}
