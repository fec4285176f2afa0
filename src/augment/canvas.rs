//! The plan compiler: operations on an image are put off and joined as far as they can be.
//!
//! A run of point operations becomes one table per channel, which is applied once: before the next
//! operation that looks at neighbours or channels together, or by whoever writes the result. A
//! histogram is counted before those tables and pushed forward through them, so that Equalize after
//! point operations needs no second pass that writes pixels. The result equals that
//! of [`apply_action`](super::apply_action) for each operation in turn, bit for bit
//! (`tests/planar_ops.rs`).

use super::resolve::{Action, CUTOUT_FILL_GRAY, CUTOUT_FILL_RGB};
use super::steps::Step;
use crate::image::draw::PixelBox;
use crate::image::planar::{Planes, color, geometry, lut, tables};
use crate::image::point::Lut;

/// An image under way through its operations, and the buffers for it, which are kept from image to
/// image: nothing is allocated after the first. One per thread.
#[derive(Clone, Debug)]
pub struct Canvas {
    planes: Planes,
    /// Where an operation writes that can't work in place.
    other: Planes,
    /// Tables that are still to be applied: none, one for all channels, or one for each.
    pending: [Lut; 3],
    n_pending: usize,
    /// Source columns of a translation.
    columns: Vec<i32>,
}

impl Default for Canvas {
    fn default() -> Self {
        Self {
            planes: Planes::default(),
            other: Planes::default(),
            pending: [[0; 256]; 3],
            n_pending: 0,
            columns: Vec::new(),
        }
    }
}

impl Canvas {
    /// Begins another image: the planes to be filled.
    pub fn start(&mut self) -> &mut Planes {
        self.n_pending = 0;
        &mut self.planes
    }

    /// Columns and rows.
    pub fn size(&self) -> (usize, usize) {
        (self.planes.width, self.planes.height)
    }

    /// The planes, to which [`Self::pending`] is still to be applied.
    pub fn planes(&self) -> &Planes {
        &self.planes
    }

    /// What is still to be applied to the bytes of a channel.
    pub fn pending(&self, channel: usize) -> Option<&Lut> {
        match self.n_pending {
            0 => None,
            1 => Some(&self.pending[0]),
            _ => Some(&self.pending[channel]),
        }
    }

    /// Applies what is pending; gives the finished planes.
    pub fn finished(&mut self) -> &Planes {
        self.flush();
        &self.planes
    }

    /// Does to the image what a step says.
    pub fn run(&mut self, step: &Step) {
        match *step {
            Step::Act(ref action) => self.apply(action),
            Step::Hue(shift) => self.shift_hue(shift),
            Step::Fill(area, fill) => self.fill_box(area, fill),
        }
    }

    /// Does to the image what an action says.
    pub fn apply(&mut self, action: &Action) {
        if self.planes.data.is_empty() {
            return;
        }
        match *action {
            Action::Identity => {}
            Action::Affine(matrix) => {
                self.flush();
                geometry::affine(&self.planes, &matrix, &mut self.other, &mut self.columns);
                self.turn_over();
            }
            Action::Rotate(degrees) => {
                self.flush();
                geometry::rotate(&self.planes, degrees, &mut self.other, &mut self.columns);
                self.turn_over();
            }
            Action::AutoContrast => self.auto_contrast(),
            Action::Equalize => self.equalize(),
            Action::Invert => self.push(&tables::invert()),
            Action::Solarize(threshold) => self.push(&tables::solarize(threshold)),
            Action::Posterize(bits) => self.push(&tables::posterize(bits)),
            Action::Contrast(factor) => {
                self.flush();
                self.push(&tables::blend(color::mean_luma(&self.planes), factor));
            }
            Action::Color(factor) => {
                self.flush();
                color::color(&mut self.planes, factor);
            }
            Action::Brightness(factor) => self.push(&tables::blend(0, factor)),
            Action::Sharpness(factor) => {
                self.flush();
                color::sharpness(&self.planes, factor, &mut self.other);
                self.turn_over();
            }
            Action::Cutout(area) => {
                let is_gray = self.planes.channels == 1;
                let fill = if is_gray { [CUTOUT_FILL_GRAY; 3] } else { CUTOUT_FILL_RGB };
                self.fill_box(area, fill);
            }
        }
    }

    /// Fills the part of a box that lies in the image. A gray image takes `fill[0]`.
    pub fn fill_box(&mut self, area: PixelBox, fill: [u8; 3]) {
        self.flush();
        self.planes.fill_box(area, fill);
    }

    /// Adds `shift` (of 256, wrapping) to every pixel's hue. A gray image stays as it is.
    pub fn shift_hue(&mut self, shift: u8) {
        self.flush();
        color::shift_hue(&mut self.planes, shift);
    }

    fn turn_over(&mut self) {
        std::mem::swap(&mut self.planes, &mut self.other);
    }

    fn flush(&mut self) {
        let Self { planes, pending, n_pending, .. } = self;
        match *n_pending {
            0 => {}
            1 => lut::apply(&mut planes.data, &pending[0]),
            _ => planes.planes_mut().zip(pending).for_each(|(plane, table)| {
                lut::apply(plane, table);
            }),
        }
        *n_pending = 0;
    }

    /// One more table for all channels.
    fn push(&mut self, table: &Lut) {
        if self.n_pending == 0 {
            (self.pending[0], self.n_pending) = (*table, 1);
            return;
        }
        for before in &mut self.pending[..self.n_pending] {
            lut::apply(before, table);
        }
    }

    /// One more table for each channel.
    fn push_each(&mut self, make: impl Fn(usize, &mut Self) -> Lut) {
        if self.n_pending == 1 {
            self.pending = [self.pending[0]; 3];
        }
        let n_channels = self.planes.channels;
        for channel in 0..n_channels {
            let table = make(channel, self);
            if self.n_pending == 0 {
                self.pending[channel] = table;
            } else {
                lut::apply(&mut self.pending[channel], &table);
            }
        }
        self.n_pending = n_channels;
    }

    /// Needs the extremes only, which the vector instructions find faster than a histogram.
    fn auto_contrast(&mut self) {
        self.flush();
        self.push_each(|channel, canvas| {
            let (low, high) = lut::extremes(canvas.plane(channel));
            tables::stretch(low, high)
        });
    }

    fn equalize(&mut self) {
        self.push_each(|channel, canvas| {
            let mut bins = [0; 256];
            lut::histogram(canvas.plane(channel), &mut bins);
            if canvas.n_pending > 0 {
                lut::push_forward(&mut bins, &canvas.pending[channel]);
            }
            tables::equalize(&bins)
        });
    }

    fn plane(&self, channel: usize) -> &[u8] {
        let n_pixels = self.planes.n_pixels();
        &self.planes.data[channel * n_pixels..][..n_pixels]
    }
}
