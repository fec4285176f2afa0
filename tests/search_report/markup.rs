//! A strict reader of the page: it takes well-formed XML without anything fancy, and HTML's void
//! elements only if they are closed.

/// Elements that HTML never closes with an end tag.
const VOID: &[&str] = &["meta", "img", "br", "col"];
const ENTITIES: &[&str] = &["amp", "lt", "gt", "quot", "#39"];

/// Panics unless the page is well-formed and its ids and links agree.
#[track_caller]
pub(crate) fn check(page: &str) {
    read(page);
    let ids: Vec<&str> = attributes(page, " id=\"").collect();
    let links: Vec<&str> = attributes(page, " href=\"").collect();
    for link in &links {
        let target = link.strip_prefix('#').expect("links stay on the page");
        assert!(ids.contains(&target), "'{link}' leads nowhere");
    }
    let mut unique = ids.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), ids.len(), "an id is there twice");
    // Each chart is read aloud, each table has a head.
    assert_eq!(page.matches("class=\"chart\"").count(), page.matches("role=\"img\"").count());
    assert_eq!(page.matches("<table>").count(), page.matches("<thead>").count());
}

/// The page without the data of its pictures, in which any letters can follow each other.
pub(crate) fn without_pictures(page: &str) -> String {
    let mut parts = page.split("data:image/png;base64,");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |text, part| text + &part[part.find('"').unwrap()..])
}

fn attributes<'a>(page: &'a str, start: &'a str) -> impl Iterator<Item = &'a str> {
    page.split(start).skip(1).map(|rest| rest.split('"').next().unwrap())
}

/// The page's texts and titles, unescaped, in order.
pub(crate) fn text(page: &str) -> String {
    let text = read(page).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"");
    text.replace("&#39;", "'").replace("&amp;", "&")
}

/// Reads the whole page and gives its text, still escaped.
#[track_caller]
fn read(page: &str) -> String {
    let mut rest = page.strip_prefix("<!DOCTYPE html>\n").expect("a document type");
    let (mut open, mut text): (Vec<&str>, String) = (Vec::new(), String::new());
    let mut n_roots = 0;
    while let Some(at) = rest.find('<') {
        check_text(&rest[..at]);
        assert!(!open.is_empty() || rest[..at].trim().is_empty(), "text outside of the document");
        text.push_str(&rest[..at]);
        let tag_end = rest[at..].find('>').expect("a tag ends") + at;
        let tag = &rest[at + 1..tag_end];
        rest = &rest[tag_end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed in another order");
            if matches!(name, "p" | "td" | "th" | "li" | "h1" | "h2" | "h3" | "text" | "span") {
                text.push('\n');
            }
            continue;
        }
        let is_closed = tag.ends_with('/');
        let tag = tag.trim_end_matches('/');
        let name = tag.split(' ').next().unwrap();
        let is_name = |name: &str| {
            !name.is_empty() && name.chars().all(|char| char.is_ascii_alphanumeric() || char == '-')
        };
        assert!(is_name(name), "'{name}' is no element");
        let mut left = &tag[name.len()..];
        while !left.is_empty() {
            let (key, value) = left.split_once("=\"").unwrap_or_else(|| panic!("'{left}'"));
            let key = key.strip_prefix(' ').expect("a space before an attribute");
            assert!(is_name(key) && !key.starts_with("on"), "'{key}' is no attribute");
            let (value, behind) = value.split_once('"').expect("a value ends");
            check_text(value);
            left = behind;
        }
        assert_eq!(is_closed, VOID.contains(&name), "'{name}'");
        if !is_closed {
            n_roots += usize::from(open.is_empty());
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "not closed: {open:?}");
    assert_eq!(n_roots, 1);
    text
}

#[track_caller]
fn check_text(text: &str) {
    assert!(!text.contains(|char: char| char.is_control() && char != '\n' && char != '\t'));
    for entity in text.split('&').skip(1) {
        let name = entity.split(';').next().unwrap();
        assert!(ENTITIES.contains(&name), "'&{name};'");
    }
}
