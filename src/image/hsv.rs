//! A turn of the hue, by way of 8-bit HSV, as Pillow converts.
//!
//! *Source*: Pillow, `src/libImaging/Convert.c`, `rgb2hsv_row` and `hsv2rgb`, with their mix of
//! single and double precision; torchvision, `adjust_hue` of Pillow images.

use super::Image;

/// Adds `shift` (of 256, wrapping) to every pixel's hue. A gray image stays as it is.
pub fn shift_hue(image: &mut Image, shift: u8) {
    if image.channels == 1 {
        return;
    }
    for pixel in image.data.as_chunks_mut::<3>().0 {
        *pixel = shifted(*pixel, shift);
    }
}

/// One pixel with its hue shifted.
pub(super) fn shifted(pixel: [u8; 3], shift: u8) -> [u8; 3] {
    let [hue, saturation, value] = to_hsv(pixel);
    from_hsv([hue.wrapping_add(shift), saturation, value])
}

#[allow(clippy::cast_possible_truncation, reason = "the casts cut, as Pillow's do")]
fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
    if min == max {
        return [0, 0, max];
    }
    let chroma = f32::from(max - min);
    let saturation = chroma / f32::from(max);
    let part = |channel: u8| f32::from(max - channel) / chroma;
    let (rc, gc, bc) = (part(r), part(g), part(b));
    let sixths = if r == max {
        bc - gc
    } else if g == max {
        (2.0 + f64::from(rc) - f64::from(bc)) as f32
    } else {
        (4.0 + f64::from(gc) - f64::from(rc)) as f32
    };
    let hue = ((f64::from(sixths) / 6.0 + 1.0) % 1.0) as f32;
    let byte = |value: f32| (f64::from(value) * 255.0) as u8;
    [byte(hue), byte(saturation), max]
}

#[allow(clippy::cast_possible_truncation, reason = "the casts cut, as Pillow's do")]
fn from_hsv([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    if saturation == 0 {
        return [value; 3];
    }
    let sixths = f64::from(hue) * 6.0 / 255.0;
    let sector = sixths.floor();
    let rest = (sixths - sector) as f32;
    let saturation = (f64::from(saturation) / 255.0) as f32;
    let part = |amount: f64| (f64::from(value) * (1.0 - amount)).round() as u8;
    let p = part(f64::from(saturation));
    let q = part(f64::from(saturation * rest));
    let t = part(f64::from(saturation) * (1.0 - f64::from(rest)));
    match sector as u8 % 6 {
        0 => [value, t, p],
        1 => [q, value, p],
        2 => [p, value, t],
        3 => [p, q, value],
        4 => [t, p, value],
        _ => [value, p, q],
    }
}
