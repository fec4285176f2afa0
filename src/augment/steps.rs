//! What is done to one image, one thing after the other: drawn first, done by whatever device.

use super::draw::{DrawnOp, PreparedPolicy};
use super::resolve::Action;
use crate::image::draw::PixelBox;
use crate::random::SampleRng;

/// One of the things that are done to an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// An operation of a policy, or one like it.
    Act(Action),
    /// Adds this (of 256, wrapping) to every pixel's hue.
    Hue(u8),
    /// Fills the part of a box that lies in the image. A gray image takes `fill[0]`.
    Fill(PixelBox, [u8; 3]),
}

impl PreparedPolicy {
    /// Appends what one image of `size` (columns, rows) gets to `out`. `drawn` is scratch space.
    pub fn steps_into(
        &self,
        size: (usize, usize),
        rng: &mut SampleRng,
        drawn: &mut Vec<DrawnOp>,
        out: &mut Vec<Step>,
    ) {
        self.draw_into(rng, drawn);
        let action = |op: &DrawnOp| op.action(self.ops_profile(), size.0, size.1);
        out.extend(drawn.iter().map(|op| Step::Act(action(op))));
    }
}
