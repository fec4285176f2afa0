//! Elements of the page, well-formed and escaped by construction.
//!
//! Owns the only way from data to markup. *Invariants*: whatever text or attribute comes in, it
//! comes out as text; every element is closed; the result is XML as well as HTML, but for the
//! document type. A number that is not finite is never written.

use std::fmt::{Display, Write as _};

/// Elements without content, which HTML wants without an end tag.
const VOID: &[&str] = &["meta", "img", "br", "col"];
/// Written for a number that there is none of.
const NO_NUMBER: &str = "–";

/// One element with its content.
#[derive(Clone, Debug)]
pub(super) struct Element {
    name: &'static str,
    attributes: String,
    content: String,
}

/// A new element of this name.
pub(super) fn el(name: &'static str) -> Element {
    Element { name, attributes: String::new(), content: String::new() }
}

impl Element {
    /// With an attribute, whose name is the program's own.
    pub(super) fn attr(mut self, name: &str, value: impl Display) -> Self {
        self.attributes.push(' ');
        self.attributes.push_str(name);
        self.attributes.push_str("=\"");
        escape(&value.to_string(), &mut self.attributes);
        self.attributes.push('"');
        self
    }

    /// With the attribute `class`.
    pub(super) fn class(self, value: &str) -> Self {
        self.attr("class", value)
    }

    /// With text behind what it has.
    pub(super) fn text(mut self, text: impl Display) -> Self {
        escape(&text.to_string(), &mut self.content);
        self
    }

    /// With an element behind what it has.
    pub(super) fn add(mut self, child: Self) -> Self {
        self.content.push_str(&child.into_string());
        self
    }

    /// With elements behind what it has.
    pub(super) fn add_all(self, children: impl IntoIterator<Item = Self>) -> Self {
        children.into_iter().fold(self, Self::add)
    }

    /// With a style sheet as its content: the program's own text, written as it is.
    pub(super) fn style_sheet(mut self, sheet: &'static str) -> Self {
        self.content.push_str(sheet);
        self
    }

    /// The markup.
    pub(super) fn into_string(self) -> String {
        let Self { name, attributes, content } = self;
        if VOID.contains(&name) {
            return format!("<{name}{attributes}/>");
        }
        format!("<{name}{attributes}>{content}</{name}>")
    }
}

/// A paragraph.
pub(super) fn paragraph(text: impl Display) -> Element {
    el("p").text(text)
}

/// A paragraph of small print.
pub(super) fn note(text: impl Display) -> Element {
    el("p").class("note").text(text)
}

/// A table with a caption and a head, in a box that scrolls if the page is too narrow for it. The
/// first cell of each row is its heading.
pub(super) fn table(caption: &str, head: &[&str], rows: Vec<Vec<Element>>) -> Element {
    let heading = |text: &&str| el("th").attr("scope", "col").text(text);
    let head = el("tr").add_all(head.iter().map(heading));
    let rows = rows.into_iter().map(|cells| el("tr").add_all(cells));
    let table = el("table")
        .add(el("caption").text(caption))
        .add(el("thead").add(head))
        .add(el("tbody").add_all(rows));
    // A scrolling box must be reachable with the keyboard.
    let scroll = el("div").class("scroll").attr("tabindex", "0").attr("role", "region");
    scroll.attr("aria-label", caption).add(table)
}

/// A row's heading.
pub(super) fn row_head(text: impl Display) -> Element {
    el("th").attr("scope", "row").text(text)
}

/// A cell of words.
pub(super) fn cell(text: impl Display) -> Element {
    el("td").text(text)
}

/// A cell of a number.
pub(super) fn number_cell(text: impl Display) -> Element {
    el("td").class("number").text(text)
}

/// A number with so many decimals.
pub(super) fn number(value: f64, n_decimals: usize) -> String {
    if !value.is_finite() {
        return NO_NUMBER.to_owned();
    }
    if value.abs() >= 1e9 {
        return format!("{value:.2e}");
    }
    let text = format!("{value:.n_decimals$}");
    // Never a minus before nothing but zeros.
    let is_zero = text.bytes().all(|byte| matches!(byte, b'-' | b'0' | b'.'));
    if is_zero { text.trim_start_matches('-').to_owned() } else { text }
}

/// A number with its sign and so many decimals.
pub(super) fn signed(value: f64, n_decimals: usize) -> String {
    let text = number(value, n_decimals);
    let is_positive = value > 0.0 && text.bytes().any(|byte| matches!(byte, b'1'..=b'9'));
    if is_positive { format!("+{text}") } else { text }
}

/// A share in [0, 1] as per cent.
pub(super) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{} %", number(100.0 * share, 2)) } else { NO_NUMBER.to_owned() }
}

/// A whole number with commas between thousands.
pub(super) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// CPU time, in seconds and, if there are many of them, in a larger unit too.
pub(super) fn seconds(value: f64) -> String {
    let exact = if value.abs() < 10.0 { 2 } else { 0 };
    let mut text = format!("{} s", number(value, exact));
    let (larger, unit) = match value {
        value if !value.is_finite() => return text,
        value if value >= 172_800.0 => (value / 86_400.0, "d"),
        value if value >= 7_200.0 => (value / 3_600.0, "h"),
        value if value >= 120.0 => (value / 60.0, "min"),
        _ => return text,
    };
    let _ = write!(text, " ({} {unit})", number(larger, 1));
    text
}

/// The first characters of a text, with an ellipsis if there are more.
pub(super) fn shortened(text: &str, n_chars: usize) -> String {
    match text.char_indices().nth(n_chars) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// Escapes for text and for attributes in double quotes. Characters that XML does not have become
/// U+FFFD.
fn escape(text: &str, out: &mut String) {
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(char),
            char if char.is_control() || matches!(char, '\u{fffe}' | '\u{ffff}') => {
                out.push('\u{fffd}');
            }
            char => out.push(char),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_text() {
        let element = el("p").attr("title", "\"><script>").text("<b>&'\"\u{0}\u{7}\n");
        assert_eq!(
            element.into_string(),
            "<p title=\"&quot;&gt;&lt;script&gt;\">&lt;b&gt;&amp;&#39;&quot;\u{fffd}\u{fffd}\n</p>"
        );
        assert_eq!(el("img").attr("alt", "").into_string(), "<img alt=\"\"/>");
        assert_eq!(el("td").into_string(), "<td></td>");
    }

    #[test]
    fn numbers_are_finite_and_readable() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!((number(value, 2).as_str(), percent(value).as_str()), ("–", "–"));
            assert_eq!((signed(value, 1), seconds(value)), ("–".to_owned(), "– s".to_owned()));
        }
        assert_eq!(number(-0.001, 2), "0.00");
        assert_eq!(number(-1.25, 1), "-1.2");
        assert_eq!(number(1e300, 2), "1.00e300");
        assert_eq!((signed(0.001, 2), signed(0.5, 2)), ("0.00".into(), "+0.50".into()));
        assert_eq!(percent(0.8512), "85.12 %");
        let counts = [0, 999, 1_000, 1_234_567].map(count);
        assert_eq!(counts, ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(seconds(1.5), "1.50 s");
        assert_eq!(seconds(7_200.0), "7200 s (2.0 h)");
        assert_eq!((shortened("äöü", 3), shortened("äöü", 2)), ("äöü".into(), "äö…".into()));
    }
}
