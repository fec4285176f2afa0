//! From the colours of a file to one or three channels, as Pillow converts.
//!
//! *Source*: `Convert.c` of Pillow (`l2rgb`, `rgb2l`, `cmyk2rgb`).

use super::Image;
use super::enhance::luma;

/// Gives `image` (of 1 or 3 channels) as many channels as wanted (1 or 3); `buffer` is scratch.
pub fn convert(image: &mut Image, channels: usize, buffer: &mut Vec<u8>) {
    if image.channels == channels {
        return;
    }
    buffer.clear();
    if channels == 1 {
        buffer.extend(image.data.as_chunks::<3>().0.iter().map(|pixel| luma(*pixel)));
    } else {
        buffer.extend(image.data.iter().flat_map(|gray| [*gray; 3]));
    }
    std::mem::swap(&mut image.data, buffer);
    image.channels = channels;
}

/// Turns four inverted CMYK channels into RGB, in place.
pub(super) fn from_inverted_cmyk(image: &mut Image) {
    let n_pixels = image.width * image.height;
    for at in 0..n_pixels {
        let pixel: [u8; 4] = std::array::from_fn(|channel| 255 - image.data[4 * at + channel]);
        let [c, m, y, k] = pixel.map(i32::from);
        let light = 255 - k;
        for (channel, ink) in [c, m, y].into_iter().enumerate() {
            image.data[3 * at + channel] = clip(light - mul_div_255(ink, light));
        }
    }
    image.data.truncate(3 * n_pixels);
    image.channels = 3;
}

/// `a * b / 255`, rounded, for bytes.
fn mul_div_255(a: i32, b: i32) -> i32 {
    let product = a * b + 128;
    ((product >> 8) + product) >> 8
}

fn clip(value: i32) -> u8 {
    u8::try_from(value.clamp(0, 255)).expect("clamped to the range of a byte")
}
