//! From a policy to pixels: draw operations, give their magnitudes a meaning, apply them.
//!
//! Owns the order in which random words are used (`draw`: a determinism contract), the meaning
//! of λ in each profile (`resolve`), and the run on one image (`apply`). Never reads a policy
//! file and never decides which policy is used.

mod apply;
mod canvas;
mod draw;
mod resolve;
mod steps;

pub use apply::{Scratch, apply_action, apply_op, cutout_area};
pub use canvas::Canvas;
pub use draw::{DrawnOp, PreparedPolicy, WORDS_PER_SLOT};
pub use resolve::{Action, CUTOUT_FILL_GRAY, CUTOUT_FILL_RGB, resolve};
pub use steps::Step;
