#include "staging.h"

#include <algorithm>
#include <numeric>

namespace tightfit {
namespace {

// The part of an attention that is one key-value head's.
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
        if (all.chosen) looking.chosen = all.chosen + row * pages.kv_heads * all.chosen_pages;
        if (all.anchor_q.data) looking.anchor_q = all.anchor_q.from(row, first);
        this->out = out.from(row, first);
        if (lse.data) this->lse.data = lse[row] + first;
    }
};

}  // namespace

HeadStaging::HeadStaging(uint8_t* memory, size_t buffer_bytes, size_t heads, size_t table_pages) : table_(table_pages) {
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

void HeadStaging::forget(const Pages& pages, size_t sequence) {
    for (Buffer& buffer : buffers_)
        if (buffer.layer == pages.keys_at && buffer.index / pages.all_heads == sequence) {
            wait(buffer.asked);
            buffer.pages = 0;
        }
}

}  // namespace tightfit
