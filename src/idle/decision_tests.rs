//! The traces that the rules are for, and random histories.

use proptest::prelude::*;

use super::*;
use crate::idle::demand::Consumer;
use crate::idle::gpu::GpuProcess;

const GIB: u64 = 1 << 30;
const TRAINER: u32 = 100;
const STRANGER: u32 = 200;
/// Time between two looks in the traces.
const SAMPLE: Duration = Duration::from_millis(200);

fn idle_gpu() -> GpuSample {
    GpuSample {
        utilisation: 0.0,
        own_utilisation: Some(0.0),
        multiprocessors: None,
        others: Vec::new(),
        sharing: Sharing::Whole,
        memory_free: 70 * GIB,
        memory_total: 80 * GIB,
    }
}

fn process(pid: u32, utilisation: f64) -> GpuProcess {
    GpuProcess { pid, utilisation: Some(utilisation) }
}

fn took(pid: u32, millis: u64, place: Place) -> (Demand, Place) {
    let age = Duration::from_millis(millis);
    (Demand { consumer: Consumer(Some(pid)), age }, place)
}

fn on_gpu(sample: GpuSample) -> Seen {
    Seen { demands: Vec::new(), gpu: Gpu::Seen(sample), cpu: None }
}

fn on_cpu(busy_others: f64, n_cores: f64) -> Seen {
    let cpu = Some(CpuSample { n_cores, busy_others, pressure: Some(0.0) });
    Seen { demands: Vec::new(), gpu: Gpu::None, cpu }
}

/// A decider that has come to run on a device like `seen`, at the time it returns.
fn running(seen: &Seen) -> (Decider, Duration) {
    let mut decider = Decider::new(Rules::default(), Duration::ZERO);
    let end = Rules::default().quiet;
    let mut at = Duration::ZERO;
    while at <= end {
        decider.decide(at, seen);
        at += SAMPLE;
    }
    assert_eq!(decider.decide(at, seen).verdict, Verdict::Run);
    (decider, at)
}

/// Looks at the same for `seconds`, and gives the verdicts without repetitions.
fn look(decider: &mut Decider, at: &mut Duration, seen: &Seen, seconds: u64) -> Vec<Verdict> {
    let end = *at + Duration::from_secs(seconds);
    let mut verdicts = Vec::new();
    while *at < end {
        *at += SAMPLE;
        verdicts.push(decider.decide(*at, seen).verdict);
    }
    verdicts.dedup();
    verdicts
}

#[test]
fn it_begins_with_a_pause_and_runs_after_the_quiet_time() {
    let mut decider = Decider::new(Rules::default(), Duration::from_secs(9));
    let found = decider.decide(Duration::from_millis(13_900), &on_gpu(idle_gpu()));
    assert_eq!(found.verdict, Verdict::Pause);
    assert_eq!(found.reason.to_string(), "quiet for 4.9 of 5.0 s");
    let found = decider.decide(Duration::from_secs(14), &on_gpu(idle_gpu()));
    assert_eq!(found, Decision { verdict: Verdict::Run, reason: Reason::Idle });
}

#[test]
fn a_trainer_that_takes_batches_stops_it_whatever_nvml_says() {
    let (mut decider, at) = running(&on_gpu(idle_gpu()));
    let mut seen = on_gpu(idle_gpu());
    seen.demands.push(took(TRAINER, 0, Place::HereOrUnknown));
    let found = decider.decide(at, &seen);
    assert_eq!(found.verdict, Verdict::Pause);
    assert_eq!(found.reason.to_string(), "process 100 takes batches");
    // The reason stays in sight while the time runs.
    seen.demands[0].0.age = Duration::from_secs(2);
    let found = decider.decide(at + Duration::from_secs(2), &seen);
    assert_eq!(found.reason.to_string(), "quiet for 2.0 of 5.0 s after: process 100 takes batches");
}

#[test]
fn a_stalled_trainer_leaves_the_device_after_the_quiet_time() {
    let sample = GpuSample { others: vec![process(TRAINER, 0.0)], ..idle_gpu() };
    let (mut decider, at) = running(&on_gpu(sample.clone()));
    let mut verdicts = Vec::new();
    for millis in (0..=6000).step_by(200) {
        let mut seen = on_gpu(sample.clone());
        seen.demands.push(took(TRAINER, millis, Place::HereOrUnknown));
        verdicts.push(decider.decide(at + Duration::from_millis(millis), &seen).verdict);
    }
    let n_paused = verdicts.iter().filter(|verdict| **verdict == Verdict::Pause).count();
    assert_eq!(n_paused, 25, "5 s of the batch's age, in samples of 0.2 s: {verdicts:?}");
    verdicts.dedup();
    assert_eq!(verdicts, [Verdict::Pause, Verdict::Run]);
}

#[test]
fn a_validation_on_the_device_keeps_it() {
    // No batch is taken from the daemon, but the trainer's process computes.
    let busy = GpuSample { utilisation: 0.9, others: vec![process(TRAINER, 0.9)], ..idle_gpu() };
    let idle = GpuSample { others: vec![process(TRAINER, 0.0)], ..idle_gpu() };
    let (mut decider, mut at) = running(&on_gpu(idle.clone()));
    let verdicts = look(&mut decider, &mut at, &on_gpu(busy), 30);
    assert_eq!(verdicts, [Verdict::Pause]);
    let verdicts = look(&mut decider, &mut at, &on_gpu(idle), 10);
    assert_eq!(verdicts, [Verdict::Pause, Verdict::Run]);
}

#[test]
fn one_small_kernel_after_the_other_is_use() {
    let sample = GpuSample {
        utilisation: 1.0,
        multiprocessors: Some(0.01),
        others: vec![process(STRANGER, 1.0)],
        ..idle_gpu()
    };
    let quiet = GpuSample { others: vec![process(STRANGER, 0.0)], ..idle_gpu() };
    let (mut decider, at) = running(&on_gpu(quiet));
    let found = decider.decide(at, &on_gpu(sample));
    assert_eq!(found.verdict, Verdict::Pause);
    assert_eq!(found.reason.to_string(), "process 200 uses the GPU, all others 100 %");
}

#[test]
fn the_search_s_own_use_is_none() {
    let own = GpuSample { utilisation: 0.97, own_utilisation: Some(0.96), ..idle_gpu() };
    let (mut decider, mut at) = running(&on_gpu(idle_gpu()));
    assert_eq!(look(&mut decider, &mut at, &on_gpu(own), 20), [Verdict::Run]);
    let untold = GpuSample { utilisation: 0.97, own_utilisation: None, ..idle_gpu() };
    let others = vec![GpuProcess { pid: STRANGER, utilisation: None }];
    let found = decider.decide(at, &on_gpu(GpuSample { others, ..untold }));
    assert_eq!(found.reason, Reason::Untold);
}

#[test]
fn a_hidden_process_is_seen_by_what_is_left() {
    // In a container the list holds nobody else; the whole is more than the search's own.
    let sample = GpuSample { utilisation: 0.8, own_utilisation: Some(0.3), ..idle_gpu() };
    let (mut decider, at) = running(&on_gpu(idle_gpu()));
    let found = decider.decide(at, &on_gpu(sample));
    assert_eq!(found.reason.to_string(), "others use the GPU, 50 %");
}

#[test]
fn another_user_s_job_arrives_and_fills_the_memory() {
    let (mut decider, mut at) = running(&on_gpu(idle_gpu()));
    let arrived = GpuSample { others: vec![process(STRANGER, 0.0)], ..idle_gpu() };
    let found = decider.decide(at, &on_gpu(arrived.clone()));
    assert_eq!(found.verdict, Verdict::Pause);
    assert_eq!(found.reason.to_string(), "process 200 came to the GPU");
    let full = GpuSample { memory_free: 3 * GIB, ..arrived.clone() };
    let found = decider.decide(at, &on_gpu(full));
    assert_eq!(found.verdict, Verdict::Evict);
    assert_eq!(found.reason.to_string(), "only 3.0 of 80.0 GiB of the GPU's memory are free");
    // There is room again: it stays evicted for the quiet time, and runs then.
    let verdicts = look(&mut decider, &mut at, &on_gpu(arrived), 10);
    assert_eq!(verdicts, [Verdict::Evict, Verdict::Run]);
}

#[test]
fn what_hides_its_users_is_left_alone() {
    for (sharing, words) in [
        (Sharing::Mig, "the GPU is cut by MIG, which hides who uses which part"),
        (Sharing::Mps, "MPS shares the GPU, and hides who uses it without GPM"),
    ] {
        let mut decider = Decider::new(Rules::default(), Duration::ZERO);
        let mut at = Duration::ZERO;
        let shared = on_gpu(GpuSample { sharing, ..idle_gpu() });
        assert_eq!(look(&mut decider, &mut at, &shared, 60), [Verdict::Pause]);
        assert_eq!(decider.decide(at, &shared).reason.to_string(), words);
        let told = GpuSample { sharing, multiprocessors: Some(0.0), ..idle_gpu() };
        let verdicts = look(&mut decider, &mut at, &on_gpu(told), 10);
        assert_eq!(verdicts, [Verdict::Pause, Verdict::Run]);
    }
}

#[test]
fn a_lost_device_ends_the_search_on_it_until_it_is_back() {
    let (mut decider, mut at) = running(&on_gpu(idle_gpu()));
    let seen = |gpu| Seen { demands: Vec::new(), gpu, cpu: None };
    let found = decider.decide(at, &seen(Gpu::Lost("GPU is lost".to_owned())));
    assert_eq!(found.verdict, Verdict::Evict);
    assert_eq!(found.reason.to_string(), "the GPU does not answer: GPU is lost");
    let verdicts = look(&mut decider, &mut at, &on_gpu(idle_gpu()), 10);
    assert_eq!(verdicts, [Verdict::Evict, Verdict::Run]);
    let found = decider.decide(at, &seen(Gpu::Blind("no permission".to_owned())));
    assert_eq!(found.verdict, Verdict::Pause);
}

#[test]
fn a_consumer_on_another_device_is_not_in_the_way() {
    let (mut decider, at) = running(&on_gpu(idle_gpu()));
    let mut seen = on_gpu(idle_gpu());
    seen.demands.push(took(TRAINER, 0, Place::Elsewhere));
    assert_eq!(decider.decide(at, &seen).verdict, Verdict::Run);
}

#[test]
fn on_processors_it_takes_idle_cores_only() {
    let (mut decider, mut at) = running(&on_cpu(0.1, 8.0));
    assert_eq!(look(&mut decider, &mut at, &on_cpu(6.0, 8.0), 10), [Verdict::Run]);
    let found = decider.decide(at, &on_cpu(6.5, 8.0));
    assert_eq!(found.verdict, Verdict::Pause);
    assert_eq!(found.reason.to_string(), "others keep 6.5 of 8 cores busy, the search takes 2");
    // A consumer that has a core to itself is not in the way; on two cores it has none.
    let mut seen = on_cpu(1.0, 8.0);
    seen.demands.push(took(TRAINER, 0, Place::HereOrUnknown));
    let verdicts = look(&mut decider, &mut at, &seen, 10);
    assert_eq!(verdicts, [Verdict::Pause, Verdict::Run]);
    let mut seen = on_cpu(0.0, 2.0);
    seen.demands.push(took(TRAINER, 0, Place::HereOrUnknown));
    assert_eq!(decider.decide(at, &seen).reason, Reason::Consumer { pid: Some(TRAINER) });
}

#[test]
fn tasks_that_wait_for_a_core_keep_it_from_beginning() {
    let mut seen = on_cpu(0.0, 8.0);
    seen.cpu.as_mut().unwrap().pressure = Some(0.3);
    let mut decider = Decider::new(Rules::default(), Duration::ZERO);
    let mut at = Duration::ZERO;
    assert_eq!(look(&mut decider, &mut at, &seen, 20), [Verdict::Pause]);
    let found = decider.decide(at, &seen);
    assert_eq!(found.reason.to_string(), "tasks wait for a core 30 % of the time");
}

/// What a random history is made of.
fn any_sample() -> impl Strategy<Value = Gpu> {
    let process =
        (1u32..6, prop_oneof![4 => Just(Some(0.0)), 1 => Just(None), 1 => Just(Some(0.5))])
            .prop_map(|(pid, utilisation)| GpuProcess { pid, utilisation });
    let sharing = prop_oneof![8 => Just(Sharing::Whole), 1 => Just(Sharing::Mig)];
    let seen = (
        prop_oneof![3 => Just(0.0), 1 => 0.0..=1.0],
        prop_oneof![3 => Just(Some(0.0)), 1 => Just(None)],
        prop_oneof![2 => Just(None), 1 => Just(Some(0.1))],
        prop::collection::vec(process, 0..3),
        sharing,
        prop_oneof![6 => Just(70 * GIB), 1 => Just(GIB)],
    )
        .prop_map(|(utilisation, own, multiprocessors, others, sharing, memory_free)| {
            Gpu::Seen(GpuSample {
                utilisation,
                own_utilisation: own,
                multiprocessors,
                others,
                sharing,
                memory_free,
                memory_total: 80 * GIB,
            })
        });
    prop_oneof![
        8 => Just(Gpu::Seen(idle_gpu())),
        4 => seen,
        3 => Just(Gpu::None),
        1 => Just(Gpu::Lost("lost".to_owned())),
        1 => Just(Gpu::Blind("blind".to_owned())),
    ]
}

fn any_seen() -> impl Strategy<Value = Seen> {
    let place = prop_oneof![Just(Place::HereOrUnknown), Just(Place::Elsewhere)];
    let demand = (1u32..4, 0u64..8000, place).prop_map(|(pid, age, place)| took(pid, age, place));
    let cpu = prop_oneof![
        1 => Just(None),
        4 => (0.0..4.0).prop_map(|busy_others| {
            Some(CpuSample { n_cores: 4.0, busy_others, pressure: None })
        })
    ];
    let demands = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(demand, 0..3)];
    (demands, any_sample(), cpu).prop_map(|(demands, gpu, cpu)| Seen { demands, gpu, cpu })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, ..ProptestConfig::default() })]

    /// 100,000 histories.
    #[test]
    fn no_history_breaks_an_invariant(
        looks in prop::collection::vec((0u64..3000, any_seen()), 5..20)
    ) {
        let rules = Rules::default();
        let mut decider = Decider::new(rules, Duration::ZERO);
        let (mut at, mut stopped_at) = (Duration::ZERO, Duration::ZERO);
        let mut is_running = false;
        let mut known: Option<BTreeSet<u32>> = None;
        for (wait, seen) in looks {
            at += Duration::from_millis(wait);
            let decision = decider.decide(at, &seen);
            prop_assert!(!decision.reason.to_string().is_empty());
            let runs = decision.verdict == Verdict::Run;
            if runs && !is_running {
                prop_assert!(at >= stopped_at + rules.quiet, "it ran again too early");
            }
            if is_running && !runs {
                stopped_at = at;
            }
            is_running = runs;
            if !runs {
                // A stop, and every pause that is not mere waiting, names what is in the way.
                prop_assert!(decision.reason != Reason::Idle);
            }
            let is_active = |place: &Place, demand: &Demand| {
                *place == Place::HereOrUnknown && demand.age <= rules.active
            };
            let n_here = seen.demands.iter().filter(|(demand, place)| is_active(place, demand));
            let has_consumer = n_here.count() > 0;
            match &seen.gpu {
                Gpu::Seen(sample) => {
                    let arrived = known
                        .as_ref()
                        .is_some_and(|known| sample.others.iter().any(|p| !known.contains(&p.pid)));
                    known = Some(sample.others.iter().map(|p| p.pid).collect());
                    let is_full = sample.memory_free * 10 < sample.memory_total;
                    let is_used = sample.others.iter().any(|p| p.utilisation > Some(0.05));
                    prop_assert!(!(runs && (has_consumer || arrived || is_full || is_used)));
                    prop_assert!(!is_full || decision.verdict == Verdict::Evict);
                }
                Gpu::Lost(_) => prop_assert_eq!(decision.verdict, Verdict::Evict),
                Gpu::Blind(_) => prop_assert!(!runs),
                Gpu::None => {
                    let busy = seen.cpu.map_or(0.0, |cpu| cpu.busy_others);
                    prop_assert!(!(runs && busy > 2.25));
                }
            }
        }
        // Whatever there was: left alone, it runs after the quiet time.
        decider.decide(at, &on_gpu(idle_gpu()));
        let later = at + rules.quiet;
        prop_assert_eq!(decider.decide(later, &on_gpu(idle_gpu())).verdict, Verdict::Run);
    }
}
