#include "staging.h"

#include <algorithm>
#include <numeric>

namespace tightfit {
namespace {

// The part of an attention that is one key-value head's. Nothing is chosen: what reads heads whole has no selector.
struct OfHead {
    Looking looking;
    Block<float> out;
    Rows<float> lse;
    Attention attention;

    OfHead(const Pages& pages, const Looking& all, Block<float> out, Rows<float> lse, const Attention& attention,
           size_t row, size_t head)
        : looking(all), out(out), lse(lse), attention(attention) {
        const size_t groups = attention.heads / pages.kv_heads, first = head * groups;
        this->attention.heads = groups;
        if (attention.sinks) this->attention.sinks = attention.sinks + first;
        looking.q = all.q.from(row, first);
        if (all.anchor_q.data) looking.anchor_q = all.anchor_q.from(row, first);
        this->out = out.from(row, first);
        if (lse.data) this->lse.data = lse[row] + first;
    }
};

}  // namespace

HeadStaging::HeadStaging(Reader& reader, uint8_t* memory, size_t buffer_bytes, size_t heads, size_t table_pages)
    : Staging(reader), table_(table_pages) {
    for (size_t i = 0; i < heads; i++) buffers_.push_back({memory + i * buffer_bytes});
    std::iota(table_.begin(), table_.end(), 0);
}

HeadStaging::Wanted HeadStaging::following(const Wanted& wanted) const {
    if (wanted.head + 1 < wanted.pages->kv_heads) return {wanted.pages, wanted.turn, wanted.head + 1};
    if (wanted.turn + 1 < sequences_.size()) return {wanted.pages, wanted.turn + 1, 0};
    return {wanted.pages->next ? wanted.pages->next : wanted.pages, 0, 0};
}

HeadStaging::Buffer* HeadStaging::find(const Wanted& wanted) {
    for (Buffer& buffer : buffers_)
        if (buffer.pages == cold(wanted) && buffer.layer == wanted.pages->keys_at && buffer.index == index(wanted))
            return &buffer;
    return nullptr;
}

// The pages of one head, with those of the file in memory; the following ones are asked for.
Pages HeadStaging::bring(const Wanted& wanted) {
    Pages head = wanted.pages->of_head(wanted.head);
    if (cold(wanted) > 0) {
        counts_.wanted++;
        if (find(wanted)) counts_.ahead++;
    }
    std::vector<Wanted> coming{wanted};
    while (coming.size() < buffers_.size()) coming.push_back(following(coming.back()));
    for (const Wanted& each : coming) {
        if (cold(each) == 0 || find(each)) continue;
        const auto spare = std::find_if(buffers_.begin(), buffers_.end(), [&](const Buffer& buffer) {
            return std::none_of(coming.begin(), coming.end(), [&](const Wanted& other) {
                return cold(other) > 0 && find(other) == &buffer;
            });
        });
        const Pages& p = *each.pages;
        const size_t pages = cold(each), keys = p.key_codec.page_bytes(), values = p.value_codec.page_bytes();
        const size_t first = index(each) * p.table_pages;
        wait(spare->asked);  // what nobody wants any more may still be on its way
        spare->layer = p.keys_at, spare->index = index(each), spare->pages = pages;
        ask({p.file, spare->memory, pages * keys, p.keys_at + first * keys});
        if (!p.shared())
            ask({p.file, spare->memory + p.table_pages * keys, pages * values, p.values_at + first * values});
        spare->asked = asked();
    }
    if (cold(wanted) == 0) return head;
    const Buffer* buffer = find(wanted);
    wait(buffer->asked);
    head.staged = table_.data();
    head.staged_keys = buffer->memory;
    head.staged_values = buffer->memory + head.table_pages * head.key_codec.page_bytes();
    return head;
}

void HeadStaging::attend_rows(const Pages& pages, const Place* places, const Paths& paths, size_t rows,
                              const Looking& looking, Block<float> out, Rows<float> lse, const Attention& attention,
                              uint8_t* scratch, size_t threads) {
    std::vector<size_t> ends;  // of each sequence's rows
    sequences_.clear();
    for (size_t row = 0; row < rows; row++) {
        const auto sequence = static_cast<size_t>(places[row].sequence);
        if (row == 0 || sequence != sequences_.back()) sequences_.push_back(sequence), ends.push_back(row);
        ends.back() = row + 1;
    }
    for (size_t turn = 0, row = 0; turn < ends.size(); row = ends[turn++])
        for (size_t h = 0; h < pages.kv_heads; h++) {
            const Pages head = bring({&pages, turn, h});
            const OfHead of(pages, looking, out, lse, attention, row, h);
            const Paths own = paths.list ? Paths{paths[row], paths.stride, nullptr} : paths;
            tightfit::attend_rows(head, places + row, own, ends[turn] - row, of.looking, of.out, of.lse, of.attention,
                                  scratch, threads);
        }
}

void HeadStaging::attend(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count,
                         const Looking& looking, Block<float> out, Rows<float> lse, const Attention& attention, bool bf16,
                         uint8_t* scratch, size_t threads) {
    const size_t each = run.slots * itemsize(pages.kind);
    sequences_ = {sequence};
    for (size_t h = 0; h < pages.kv_heads; h++) {
        const Pages head = bring({&pages, 0, h});
        const OfHead of(pages, looking, out, lse, attention, 0, h);
        const Run own{run.keys + h * each * pages.key_dim,
                      run.values + h * each * (pages.shared() ? pages.key_dim : pages.value_dim), run.slots, run.count};
        tightfit::attend(head, sequence, own, start, count, of.looking, of.out, of.lse, of.attention, bf16, scratch,
                         threads);
    }
}

void HeadStaging::forget(const Pages& pages, size_t sequence, size_t head, size_t from) {
    for (Buffer& buffer : buffers_)
        if (buffer.layer == pages.keys_at && buffer.index == pages.at(sequence, head) && buffer.pages > from) {
            wait(buffer.asked);
            buffer.pages = 0;
        }
}

PageStaging::PageStaging(Reader& reader, uint8_t* memory, int32_t* staged, size_t lists, size_t table_pages, size_t places)
    : Staging(reader), memory_(memory), staged_(staged), table_pages_(table_pages), each_(places), places_(lists * places) {
    std::fill(staged, staged + lists * table_pages, -1);
}

// The place of page `page` of list `index`, which is asked for if it is not there; none if all places are taken.
const PageStaging::Place* PageStaging::bring(const Pages& pages, size_t index, int32_t page) {
    int32_t& at = staged_[index * table_pages_ + static_cast<size_t>(page)];
    if (at < 0) {
        const auto first = places_.begin() + static_cast<std::ptrdiff_t>(index * each_);
        const auto oldest = std::min_element(first, first + static_cast<std::ptrdiff_t>(each_),
                                             [](const Place& a, const Place& b) { return a.used < b.used; });
        if (oldest->used == now_) return nullptr;
        wait(oldest->asked);
        if (oldest->page >= 0) staged_[index * table_pages_ + static_cast<size_t>(oldest->page)] = -1;
        oldest->page = page;
        at = static_cast<int32_t>(oldest - places_.begin());
        const size_t keys = pages.key_codec.page_bytes(), values = pages.value_codec.page_bytes();
        const size_t in_file = index * table_pages_ + static_cast<size_t>(page), place = static_cast<size_t>(at);
        ask({pages.file, memory_ + place * keys, keys, pages.keys_at + in_file * keys});
        if (!pages.shared())
            ask({pages.file, memory_ + places_.size() * keys + place * values, values, pages.values_at + in_file * values});
        oldest->asked = asked();
    }
    Place& place = places_[static_cast<size_t>(at)];
    place.used = now_;
    return &place;
}

void PageStaging::attend_rows(const Pages& pages, const tightfit::Place* places, const Paths& paths, size_t rows,
                              const Looking& looking, Block<float> out, Rows<float> lse, const Attention& attention,
                              uint8_t* scratch, size_t threads) {
    Pages here = pages;
    here.staging = nullptr;
    if (!looking.chosen || looking.since) {
        tightfit::attend_rows(here, places, paths, rows, looking, out, lse, attention, scratch, threads);
        return;
    }
    here.staged = staged_, here.staged_stride = table_pages_, here.staged_keys = memory_;
    here.staged_values = memory_ + places_.size() * pages.key_codec.page_bytes();
    for (size_t row = 0; row < rows; row++) {  // one after the other, so that each finds room for what it sees
        now_++;
        Looking own = looking;
        own.q = looking.q.from(row, 0);
        if (looking.anchor_q.data) own.anchor_q = looking.anchor_q.from(row, 0);
        own.chosen = looking.chosen + row * pages.kv_heads * looking.listed;
        uint64_t last = 0;
        for (size_t h = 0; h < pages.kv_heads; h++) {
            const size_t index = pages.at(static_cast<size_t>(places[row].sequence), h);
            const int32_t* list = own.chosen + h * looking.listed;
            for (size_t i = 0; i < looking.listed && list[i] >= 0 && list[i] < pages.cold[index]; i++) {
                counts_.wanted++;
                if (staged_[index * table_pages_ + static_cast<size_t>(list[i])] >= 0) counts_.ahead++;
                last = std::max(last, bring(pages, index, list[i])->asked);
            }
        }
        wait(last);
        const Paths path = paths.list ? Paths{paths[row], paths.stride, nullptr} : paths;
        const Rows<float> sums{lse.data ? lse[row] : nullptr, lse.stride};
        tightfit::attend_rows(here, places + row, path, 1, own, out.from(row, 0), sums, attention, scratch, threads);
    }
}

void PageStaging::attend(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count,
                         const Looking& looking, Block<float> out, Rows<float> lse, const Attention& attention, bool bf16,
                         uint8_t* scratch, size_t threads) {
    Pages here = pages;
    here.staging = nullptr;
    tightfit::attend(here, sequence, run, start, count, looking, out, lse, attention, bf16, scratch, threads);
}

void PageStaging::prefetch(const Pages& pages, const tightfit::Place* places, size_t rows, const int32_t* wanted,
                           size_t count) {
    for (size_t task = 0; task < rows * pages.kv_heads; task++) {
        const size_t row = task / pages.kv_heads;
        const size_t index = pages.at(static_cast<size_t>(places[row].sequence), task % pages.kv_heads);
        const int32_t* list = wanted + task * count;
        for (size_t i = 0; i < count && list[i] >= 0; i++)
            if (list[i] < pages.cold[index] && !bring(pages, index, list[i])) break;
    }
}

void PageStaging::forget(const Pages& pages, size_t sequence, size_t head, size_t from) {
    const size_t index = pages.at(sequence, head);
    for (size_t page = from; page < table_pages_; page++) {
        int32_t& at = staged_[index * table_pages_ + page];
        if (at < 0) continue;
        Place& place = places_[static_cast<size_t>(at)];
        wait(place.asked);
        place.page = at = -1;
    }
}

}  // namespace tightfit
