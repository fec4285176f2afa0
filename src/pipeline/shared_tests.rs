//! Tests of [`super`].

use super::*;

const OPTIONS: DecodeOptions = DecodeOptions {
    channels: 3,
    turn: false,
    limits: crate::image::decode::DecodeLimits { max_side: 9, max_pixels: 9 },
};

fn image(byte: u8) -> Arc<SharedImage> {
    let image = Image { width: 1, height: 1, channels: 3, data: vec![byte; 3] };
    Arc::new(SharedImage { image, is_reducible: false })
}

fn join(window: &Arc<DecodedWindow>) -> Membership {
    window.join(0, OPTIONS, 1, "crop".to_owned())
}

fn at(sample_idx: u64) -> ImagePlace {
    ImagePlace { sample_idx, ..ImagePlace::default() }
}

fn put(member: &Membership, sample_idx: u64, byte: u8) {
    let Claim::Mine(making) = member.claim(at(sample_idx), 1) else { panic!("not made yet") };
    making.put(image(byte));
}

#[test]
fn each_other_member_takes_an_image_once() {
    let window = DecodedWindow::new(10_000);
    let [a, b, c] = [0; 3].map(|_| join(&window));
    let strangers = [
        window.join(1, OPTIONS, 1, "crop".to_owned()),
        window.join(0, OPTIONS, 2, "crop".to_owned()),
        window.join(0, OPTIONS, 1, "another crop".to_owned()),
    ];
    put(&a, 5, 1);
    assert!(strangers.iter().all(|stranger| stranger.get(at(5)).is_none()));
    assert!(b.get(at(6)).is_none());
    assert!(b.get(ImagePlace { epoch: 1, ..at(5) }).is_none());
    assert_eq!(b.get(at(5)).unwrap().image.data, [1; 3]);
    assert_eq!(c.get(at(5)).unwrap().image.data, [1; 3]);
    assert!(c.get(at(5)).is_none(), "all others have had it");
    assert_eq!(window.lock().bytes, 0);
}

#[test]
fn a_single_member_stores_nothing_and_the_last_leaves_nothing() {
    let window = DecodedWindow::new(10_000);
    let a = join(&window);
    assert!(matches!(a.claim(at(1), 1), Claim::Alone));
    let b = join(&window);
    assert!(matches!(a.claim(at(1), 1700), Claim::Alone), "more than half of the room");
    put(&b, 1, 1);
    let Claim::Mine(left_alone) = a.claim(at(2), 1) else { panic!("not made yet") };
    drop(b);
    assert_eq!(window.lock().bytes, 0);
    left_alone.put(image(2));
    assert_eq!(window.lock().images.len(), 0);
    drop(a);
    assert!(window.lock().members.is_empty());
}

#[test]
fn streams_of_one_crop_are_one_member_of_the_whole_images() {
    let window = DecodedWindow::new(10_000);
    let [a, b] = [0; 2].map(|_| join(&window));
    assert_eq!(a.whole().unwrap().n_members(), 1);
    let other = window.join(0, OPTIONS, 1, "another crop".to_owned());
    assert_eq!(a.whole().unwrap().n_members(), 2);
    put(b.whole().unwrap(), 3, 1);
    assert!(other.whole().unwrap().get(at(3)).is_some());
    drop(a);
    assert_eq!(other.whole().unwrap().n_members(), 2);
    drop(b);
    assert_eq!(other.whole().unwrap().n_members(), 1);
}

#[test]
fn who_finds_an_image_in_the_making_waits_and_makes_it_if_that_fails() {
    let window = DecodedWindow::new(10_000);
    let (a, b) = (join(&window), join(&window));
    for is_made in [true, false] {
        let Claim::Mine(making) = a.claim(at(1), 1) else { panic!("not made yet") };
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| match b.claim(at(1), 1) {
                Claim::Ready(image) => Some(image.image.data[0]),
                Claim::Mine(_) => None,
                Claim::Alone => panic!("there is another"),
            });
            if is_made {
                making.put(image(9));
            } else {
                drop(making);
            }
            assert_eq!(waiting.join().unwrap(), is_made.then_some(9));
        });
        assert_eq!(window.lock().images.len(), 0);
    }
}

#[test]
fn images_that_nobody_takes_are_soon_made_by_each_alone() {
    let window = DecodedWindow::new(100_000);
    let (a, b) = (join(&window), join(&window));
    let put = |from: u64, is_taken: bool| {
        let mut n_put = 0;
        for sample in from..from + 5000 {
            if let Claim::Mine(making) = a.claim(at(sample), 1) {
                making.put(image(1));
                n_put += 1;
                assert_eq!(b.get(at(sample + u64::from(!is_taken))).is_some(), is_taken);
            }
        }
        n_put
    };
    assert_eq!(put(0, true), 5000);
    assert!(put(10_000, false) < 5 * TRIAL_IMAGES);
    // The next trial finds that it pays again.
    assert!(put(20_000, true) > 2000);
}

#[test]
fn the_oldest_give_way_and_the_room_is_kept() {
    let window = DecodedWindow::new(2 * (3 + ENTRY_BYTES) + 1);
    let (a, b) = (join(&window), join(&window));
    for sample in 0..3 {
        put(&a, sample, 7);
    }
    assert_eq!(window.lock().bytes, 2 * (3 + ENTRY_BYTES));
    assert!(b.get(at(0)).is_none());
    assert!(b.get(at(1)).is_some() && b.get(at(2)).is_some());
    for sample in 0..1000 {
        put(&a, sample, 7);
        assert!(b.get(at(sample)).is_some());
    }
    put(&a, 1000, 7);
    for sample in 1001..2000 {
        put(&a, sample, 7);
        assert!(b.get(at(sample)).is_some());
    }
    assert!(window.lock().order.len() < 50, "no trace of what was taken, though one is left");
}
