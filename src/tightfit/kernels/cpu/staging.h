// What lies in the file is brought into memory before it is multiplied, ahead of its use where that is known.
#pragma once

#include <vector>

#include "pages.h"
#include "reader.h"

namespace tightfit {

// What was wanted of the file, heads or pages, how many of them had been asked for before they were wanted, the bytes
// that were read, and the nanoseconds for which attention waited.
struct Counts {
    uint64_t wanted = 0, ahead = 0, bytes = 0, waited = 0;
};

class Staging {
public:
    explicit Staging(Reader& reader) : reader_(reader) {}
    virtual ~Staging() = default;

    // As the functions of pages.h, for pages that are staged here.
    virtual void attend_rows(const Pages& pages, const Place* places, const Paths& paths, size_t rows,
                             const Looking& looking, Block<float> out, Rows<float> lse, const Attention& attention,
                             uint8_t* scratch, size_t threads) = 0;
    virtual void attend(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count,
                        const Looking& looking, Block<float> out, Rows<float> lse, const Attention& attention, bool bf16,
                        uint8_t* scratch, size_t threads) = 0;
    // The heads that are looked at at once: scratch memory is theirs.
    virtual size_t heads_at_once(const Pages& pages) const = 0;
    // Pages of a head from page `from` on are about to change.
    virtual void forget(const Pages& pages, size_t sequence, size_t head, size_t from) = 0;

    const Counts& counts() const { return counts_; }
    // Returns when nothing is being read.
    void rest() { reader_.wait(asked_); }

protected:
    void ask(const Request& request) {
        counts_.bytes += request.bytes;
        asked_ = reader_.ask(request);
    }
    uint64_t asked() const { return asked_; }
    void wait(uint64_t count) { counts_.waited += reader_.wait(count); }

    Counts counts_;

private:
    Reader& reader_;
    uint64_t asked_ = 0;
};

// Heads one after the other: all pages that a head has in the file are in one of `heads` buffers while it is looked at,
// and those of the heads that come next are read into the others. After the last head of a layer comes the first of
// pages.next.
class HeadStaging final : public Staging {
public:
    HeadStaging(Reader& reader, uint8_t* memory, size_t buffer_bytes, size_t heads, size_t table_pages);

    void attend_rows(const Pages& pages, const Place* places, const Paths& paths, size_t rows, const Looking& looking,
                     Block<float> out, Rows<float> lse, const Attention& attention, uint8_t* scratch,
                     size_t threads) override;
    void attend(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count, const Looking& looking,
                Block<float> out, Rows<float> lse, const Attention& attention, bool bf16, uint8_t* scratch,
                size_t threads) override;
    size_t heads_at_once(const Pages&) const override { return 1; }
    void forget(const Pages& pages, size_t sequence, size_t head, size_t from) override;

private:
    struct Wanted {
        const Pages* pages;
        size_t turn, head;  // of sequences_[turn]
    };
    struct Buffer {
        uint8_t* memory;
        size_t layer = 0, index = 0, pages = 0;  // where its first page lies in the file tells a layer
        uint64_t asked = 0;
    };

    Wanted following(const Wanted& wanted) const;
    size_t index(const Wanted& wanted) const { return wanted.pages->at(sequences_[wanted.turn], wanted.head); }
    size_t cold(const Wanted& wanted) const { return static_cast<size_t>(wanted.pages->cold[index(wanted)]); }
    Buffer* find(const Wanted& wanted);
    Pages bring(const Wanted& wanted);

    std::vector<Buffer> buffers_;
    std::vector<size_t> sequences_;  // of a step, in the order in which they are looked at
    std::vector<int32_t> table_;  // page j is in place j
};

// Pages of one layer of which a row sees only some that are chosen: each head has `places` of them in memory, those that were
// wanted last. prefetch() reads what may be wanted next.
class PageStaging final : public Staging {
public:
    // `staged` (lists, table_pages) for as many heads of all sequences.
    PageStaging(Reader& reader, uint8_t* memory, int32_t* staged, size_t lists, size_t table_pages, size_t places);

    void attend_rows(const Pages& pages, const tightfit::Place* places, const Paths& paths, size_t rows,
                     const Looking& looking, Block<float> out, Rows<float> lse, const Attention& attention,
                     uint8_t* scratch, size_t threads) override;
    void attend(const Pages& pages, size_t sequence, const Run& run, size_t start, size_t count, const Looking& looking,
                Block<float> out, Rows<float> lse, const Attention& attention, bool bf16, uint8_t* scratch,
                size_t threads) override;
    size_t heads_at_once(const Pages& pages) const override { return pages.kv_heads; }
    void forget(const Pages& pages, size_t sequence, size_t head, size_t from) override;

    // Asks for the pages `wanted` (rows, kv_heads, count), then -1, as long as there are places that were not used by what
    // was looked at last.
    void prefetch(const Pages& pages, const tightfit::Place* places, size_t rows, const int32_t* wanted, size_t count);

private:
    struct Place {
        int32_t page = -1;
        uint64_t used = 0, asked = 0;
    };
    const Place* bring(const Pages& pages, size_t index, int32_t page);

    uint8_t* memory_;
    int32_t* staged_;
    size_t table_pages_, each_;
    std::vector<Place> places_;  // those of each list one behind the other
    uint64_t now_ = 0;           // rows that were looked at
};

}  // namespace tightfit
