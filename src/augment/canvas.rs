//! The plan compiler: operations on an image are put off and joined as far as they can be.
//!
//! A run of point operations becomes one table per channel, which is applied once: before the next
//! operation that looks at neighbours or channels together, or by whoever writes the result. The
//! histogram is counted once and pushed forward through every table that follows, so AutoContrast
//! and Equalize after a point operation need no second pass over the pixels. The result equals that
//! of [`apply_action`](super::apply_action) for each operation in turn, bit for bit
//! (`tests/planar_ops.rs`).

use super::draw::{DrawnOp, PreparedPolicy};
use super::resolve::{Action, CUTOUT_FILL_GRAY, CUTOUT_FILL_RGB};
use crate::image::draw::PixelBox;
use crate::image::enhance::blend_lut;
use crate::image::planar::{Planes, color, geometry, lut};
use crate::image::point::{self, Lut};
use crate::random::SampleRng;

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
    /// Of the image with the pending tables applied; right if `is_counted`.
    histograms: [[u32; 256]; 3],
    is_counted: bool,
    /// Source columns of a translation.
    columns: Vec<i32>,
    /// Operations of the image at hand.
    drawn: Vec<DrawnOp>,
}

impl Default for Canvas {
    fn default() -> Self {
        Self {
            planes: Planes::default(),
            other: Planes::default(),
            pending: [[0; 256]; 3],
            n_pending: 0,
            histograms: [[0; 256]; 3],
            is_counted: false,
            columns: Vec::new(),
            drawn: Vec::new(),
        }
    }
}

impl PreparedPolicy {
    /// As [`Self::augment`], on a canvas.
    pub fn augment_canvas(&self, canvas: &mut Canvas, rng: &mut SampleRng) {
        let mut drawn = std::mem::take(&mut canvas.drawn);
        self.draw_into(rng, &mut drawn);
        let (width, height) = canvas.size();
        for op in &drawn {
            canvas.apply(&op.action(self.ops_profile(), width, height));
        }
        canvas.drawn = drawn;
    }
}

impl Canvas {
    /// Begins another image: the planes to be filled.
    pub fn start(&mut self) -> &mut Planes {
        (self.n_pending, self.is_counted) = (0, false);
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
            Action::AutoContrast => self.push_from_histograms(point::autocontrast_lut),
            Action::Equalize => self.push_from_histograms(point::equalize_lut),
            Action::Invert => self.push(&point::invert_lut()),
            Action::Solarize(threshold) => self.push(&point::solarize_lut(threshold)),
            Action::Posterize(bits) => self.push(&point::posterize_lut(bits)),
            Action::Contrast(factor) => {
                self.flush();
                self.push(&blend_lut(color::mean_luma(&self.planes), factor));
            }
            Action::Color(factor) => {
                self.flush();
                color::color(&mut self.planes, factor);
                self.is_counted = false;
            }
            Action::Brightness(factor) => self.push(&blend_lut(0, factor)),
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
        self.is_counted = false;
    }

    /// Adds `shift` (of 256, wrapping) to every pixel's hue. A gray image stays as it is.
    pub fn shift_hue(&mut self, shift: u8) {
        self.flush();
        color::shift_hue(&mut self.planes, shift);
        self.is_counted = false;
    }

    fn turn_over(&mut self) {
        std::mem::swap(&mut self.planes, &mut self.other);
        self.is_counted = false;
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
        } else {
            for before in &mut self.pending[..self.n_pending] {
                lut::apply(before, table);
            }
        }
        if self.is_counted {
            for bins in &mut self.histograms[..self.planes.channels] {
                lut::push_forward(bins, table);
            }
        }
    }

    /// One more table for each channel, made of the channel's histogram.
    fn push_from_histograms(&mut self, make: impl Fn(&[u32; 256]) -> Lut) {
        self.count();
        let n_channels = self.planes.channels;
        if self.n_pending == 1 {
            self.pending = [self.pending[0]; 3];
        }
        let pairs = self.pending.iter_mut().zip(&mut self.histograms);
        for (pending, bins) in pairs.take(n_channels) {
            let table = make(bins);
            lut::push_forward(bins, &table);
            if self.n_pending == 0 {
                *pending = table;
            } else {
                lut::apply(pending, &table);
            }
        }
        self.n_pending = n_channels;
    }

    /// Makes the histograms right.
    fn count(&mut self) {
        if self.is_counted {
            return;
        }
        for channel in 0..self.planes.channels {
            let bins = &mut self.histograms[channel];
            let plane = self.planes.planes().nth(channel).expect("a channel has a plane");
            lut::histogram(plane, bins);
            match self.n_pending {
                0 => {}
                1 => lut::push_forward(bins, &self.pending[0]),
                _ => lut::push_forward(bins, &self.pending[channel]),
            }
        }
        self.is_counted = true;
    }
}
